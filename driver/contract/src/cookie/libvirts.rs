//! What is libvirt's own in a cookie: its text, which grows by what we add, and a few elements of it.

use super::{Error, MAX_COOKIE};
use crate::xml::text_of_reference;
use quick_xml::events::Event;
use quick_xml::NsReader;
use std::ops::Range;

/// Adds to the figures of the job that the source tells the destination, in libvirt's own `<statistics>` of the cookie
/// of the real Perform: the destination shows them as its own (`virsh domjobinfo --completed`). A cookie without
/// them stays as it is.
pub fn with_figures<'a>(
    cookie: &[u8],
    figures: impl IntoIterator<Item = (&'a str, u64)>,
) -> Result<Vec<u8>, Error> {
    let text = text(cookie)?;
    let Some(place) = content_of(text, "statistics")? else {
        return Ok(cookie.to_vec());
    };
    let mut content = text[place.clone()].to_owned();
    for (name, value) in figures {
        add(&mut content, name, value);
    }
    bounded([&text[..place.start], &content, &text[place.end..], "\0"].concat())
}

/// Adds to a number in `<name>number</name>`, as libvirt writes them, or adds the element.
fn add(content: &mut String, name: &str, value: u64) {
    let tag = format!("<{name}>");
    let number = content.find(&tag).map(|at| at + tag.len()).and_then(|start| {
        let end = start + content[start..].find('<')?;
        Some((start..end, content[start..end].parse::<u64>().ok()?))
    });
    match number {
        Some((place, known)) => content.replace_range(place, &known.saturating_add(value).to_string()),
        None => content.push_str(&format!("<{name}>{value}</{name}>")),
    }
}

/// Where the content of the root's first child of this name is.
fn content_of(text: &str, name: &str) -> Result<Option<Range<usize>>, Error> {
    let mut reader = NsReader::from_str(text);
    // A position in a text fits.
    let position = |reader: &NsReader<&[u8]>| usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX);
    let (mut depth, mut begin) = (0u32, None);
    loop {
        let before = position(&reader);
        match reader
            .read_event()
            .map_err(|error| Error::Cookie(error.to_string()))?
        {
            Event::Start(start) => {
                if depth == 1 && begin.is_none() && start.name().into_inner() == name {
                    begin = Some(position(&reader));
                }
                depth += 1;
            }
            Event::End(_) => {
                depth = depth.saturating_sub(1);
                if let (1, Some(begin)) = (depth, begin) {
                    return Ok(Some(begin..before));
                }
            }
            Event::Eof => return Ok(None),
            _ => {}
        }
    }
}

/// The text of libvirt's own element of this name (`name`, `uuid`) in a cookie.
pub fn text_of(cookie: &[u8], name: &str) -> Result<Option<String>, Error> {
    let mut reader = NsReader::from_str(text(cookie)?);
    let malformed = |error: &dyn std::fmt::Display| Error::Cookie(error.to_string());
    let (mut depth, mut inside, mut found) = (0u32, false, String::new());
    loop {
        match reader.read_event().map_err(|error| malformed(&error))? {
            Event::Start(start) => {
                inside = depth == 1 && start.name().into_inner() == name;
                depth += 1;
            }
            Event::Text(piece) if inside => found.push_str(&piece.xml10_content()),
            Event::GeneralRef(reference) if inside => {
                found.push_str(&text_of_reference(&reference).map_err(|error| malformed(&error))?);
            }
            Event::End(_) if inside => return Ok(Some(found)),
            Event::End(_) => depth = depth.saturating_sub(1),
            Event::Eof => return Ok(None),
            _ => {}
        }
    }
}

/// The cookie's text without its final NUL.
pub(super) fn text(cookie: &[u8]) -> Result<&str, Error> {
    if cookie.len() > MAX_COOKIE {
        return Err(Error::Cookie(format!("it is longer than {MAX_COOKIE} bytes")));
    }
    let bytes = cookie
        .strip_suffix(b"\0")
        .ok_or_else(|| Error::Cookie("it does not end with NUL".into()))?;
    std::str::from_utf8(bytes).map_err(|_| Error::Cookie("it is not UTF-8".into()))
}

/// The cookie with an element of ours as the last child of its root.
pub(super) fn insert(cookie: &[u8], element: &str) -> Result<Vec<u8>, Error> {
    let text = text(cookie)?;
    let end = text
        .rfind("</qemu-migration>")
        .ok_or_else(|| Error::Cookie("it has no <qemu-migration>".into()))?;
    bounded([&text[..end], element, &text[end..], "\0"].concat())
}

/// A cookie that libvirt will take.
fn bounded(cookie: String) -> Result<Vec<u8>, Error> {
    if cookie.len() > MAX_COOKIE {
        return Err(Error::Cookie(format!(
            "with what we add it is longer than {MAX_COOKIE} bytes"
        )));
    }
    Ok(cookie.into_bytes())
}
