//! What libvirt's own Prepare leaves of a guest that does not come: an object that is listed, cannot be undefined, and keeps
//! the guest from ever coming (libvirt 11.3: nobody removes it when an offline migration is cancelled).
//!
//! Defined, it can be undefined. A crash in between leaves it defined: by its mark it is told from a guest, which no host
//! starts and a recovery removes, while what the operator has defined meanwhile is left alone.

use crate::libvirt::{Connection, Domain, Error};
use ferry_contract::cold::{is_remains, REMAINS};
use ferry_contract::session::Guest;
use roxmltree::Document;

/// Removes it, if it is there.
pub fn exorcise(connection: Connection, guest: &Guest, definition: &str) {
    let Ok(domain) = connection.domain(guest.uuid) else {
        return;
    };
    let domain = domain.get();
    let (Ok(false), Ok(true)) = (domain.is_persistent(), domain.is_shut_off()) else {
        return;
    };
    let gone = marked(definition)
        .ok_or_else(|| Error::failed("its definition has no name"))
        .and_then(|definition| connection.define(&definition))
        .and_then(|domain| domain.get().undefine());
    if let Err(error) = gone {
        tracing::warn!(
            guest = guest.name,
            "libvirt's half of an arriving guest is left until its daemon is restarted: {error}"
        );
    }
}

/// Whether a guest that libvirt knows is only what a crash left of that.
///
/// # Errors
/// libvirt's.
pub fn is_left(domain: Domain) -> Result<bool, Error> {
    Ok(is_remains(&domain.definition()?))
}

/// The definition with the mark, for its metadata.
fn marked(xml: &str) -> Option<String> {
    let document = Document::parse(xml).ok()?;
    let child = |name| {
        let mut children = document.root_element().children();
        children.find(move |child| child.has_tag_name(name))
    };
    let behind = |name: roxmltree::Node| name.range().end..name.range().end;
    let place = match child("metadata") {
        Some(metadata) => metadata.range(),
        None => behind(child("name")?),
    };
    Some(format!(
        "{}<metadata>{REMAINS}</metadata>{}",
        &xml[..place.start],
        &xml[place.end..]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_only_removed_has_a_mark() {
        let with = |metadata: &str| {
            format!("<domain><name>g</name>{metadata}<devices><x><metadata/></x></devices></domain>")
        };
        let expected = with(&format!("<metadata>{REMAINS}</metadata>"));
        for before in ["", "<metadata><a:b xmlns:a='c'/></metadata>", "<metadata/>"] {
            let before = with(before);
            assert!(!is_remains(&before));
            assert_eq!(marked(&before).as_deref(), Some(&*expected));
        }
        assert!(is_remains(&expected) && Document::parse(&expected).is_ok());
        assert_eq!(marked("<domain/>"), None);
    }
}
