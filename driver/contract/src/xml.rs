//! Attributes and references of XML from another host.

use crate::cold::Malformed;
use crate::cookie::NAMESPACE;
use quick_xml::events::{BytesRef, BytesStart};
use quick_xml::name::ResolveResult;

/// The attributes of one element.
pub(crate) struct Attributes(Vec<(String, String)>);

impl Attributes {
    pub(crate) fn read(start: &BytesStart<'_>) -> Result<Self, Malformed> {
        let mut list = Vec::new();
        for attribute in start.attributes() {
            let attribute = attribute.map_err(|error| Malformed(error.to_string()))?;
            let value = attribute.normalized_value(quick_xml::XmlVersion::Implicit1_0);
            let value = value.map_err(|error| Malformed(error.to_string()))?;
            list.push((attribute.key.into_inner().to_owned(), value.into_owned()));
        }
        Ok(Self(list))
    }

    pub(crate) fn text(&self, name: &str) -> Result<&str, Malformed> {
        let found = self.0.iter().find(|(key, _)| key == name);
        found
            .map(|(_, value)| value.as_str())
            .ok_or_else(|| Malformed(format!("attribute {name} is missing")))
    }

    pub(crate) fn parsed<T: std::str::FromStr>(&self, name: &str) -> Result<T, Malformed> {
        self.text(name)?
            .parse()
            .map_err(|_| Malformed(format!("attribute {name} cannot be read")))
    }

    pub(crate) fn optional<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, Malformed> {
        match self.0.iter().any(|(key, _)| key == name) {
            true => self.parsed(name).map(Some),
            false => Ok(None),
        }
    }
}

/// Whether a name is of our namespace.
pub(crate) fn is_ours(namespace: &ResolveResult<'_>) -> bool {
    matches!(namespace, ResolveResult::Bound(bound) if bound.into_inner() == NAMESPACE)
}

/// What a reference (`&amp;`, `&#10;`) stands for.
pub(crate) fn text_of_reference(reference: &BytesRef<'_>) -> Result<String, String> {
    match reference.resolve_char_ref().map_err(|error| error.to_string())? {
        Some(character) => Ok(character.to_string()),
        None => quick_xml::escape::resolve_predefined_entity(reference)
            .map(str::to_owned)
            .ok_or_else(|| "an unknown entity".to_owned()),
    }
}
