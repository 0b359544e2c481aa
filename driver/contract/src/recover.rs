//! What `virt-ferry recover` gives libvirt to define: no guest, but the word at which the plug-in looks at its journals.

use crate::cold::RECOVER;
use std::fmt;
use uuid::Uuid;

/// Before a guest's UUID, and after it.
const ABORT: &str = "<virt-ferry-recover abort='";
const OWN: &str = "<virt-ferry-recover own='";
const END: &str = "'/>";

/// What the plug-in is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// To bring all that is open to an end.
    Recover,
    /// To give one guest's migration up.
    Abort(Uuid),
    /// To take one guest for this host's: the other host is lost for good.
    Own(Uuid),
}

impl Word {
    /// The word in a text; `None` where it is something else.
    pub fn read(text: &str) -> Option<Self> {
        if text == RECOVER {
            return Some(Self::Recover);
        }
        let uuid = |start| text.strip_prefix(start)?.strip_suffix(END)?.parse().ok();
        uuid(ABORT).map(Self::Abort).or_else(|| uuid(OWN).map(Self::Own))
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Recover => f.write_str(RECOVER),
            Self::Abort(uuid) => write!(f, "{ABORT}{uuid}{END}"),
            Self::Own(uuid) => write!(f, "{OWN}{uuid}{END}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_survives_its_text_and_a_guest_is_none() {
        let uuid = Uuid::from_u128(7);
        for word in [Word::Recover, Word::Abort(uuid), Word::Own(uuid)] {
            assert_eq!(Word::read(&word.to_string()), Some(word));
        }
        for text in [
            "",
            "<domain/>",
            "<virt-ferry-recover abort='x'/>",
            "<virt-ferry-recover abort='",
        ] {
            assert_eq!(Word::read(text), None, "{text}");
        }
    }
}
