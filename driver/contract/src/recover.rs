//! What `virt-ferry recover` gives libvirt to define: no guest, but the word at which the plug-in looks at its journals.

use crate::cold::RECOVER;
use std::fmt;
use uuid::Uuid;

/// Before and after a guest's UUID.
const ABORT: [&str; 2] = ["<virt-ferry-recover abort='", "'/>"];

/// What the plug-in is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// To bring all that is open to an end.
    Recover,
    /// To give one guest's migration up.
    Abort(Uuid),
}

impl Word {
    /// The word in a text; `None` where it is something else.
    pub fn read(text: &str) -> Option<Self> {
        if text == RECOVER {
            return Some(Self::Recover);
        }
        let uuid = text.strip_prefix(ABORT[0])?.strip_suffix(ABORT[1])?;
        uuid.parse().ok().map(Self::Abort)
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Recover => f.write_str(RECOVER),
            Self::Abort(uuid) => write!(f, "{}{uuid}{}", ABORT[0], ABORT[1]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_survives_its_text_and_a_guest_is_none() {
        for word in [Word::Recover, Word::Abort(Uuid::from_u128(7))] {
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
