//! Our element in libvirt's migration cookie: how two plug-ins find each other.
//!
//! libvirt carries an XML cookie, `<qemu-migration>`, from each phase to the next. It ignores child elements it
//! does not know (libvirt 9.0 and 11.3, `qemu_migration_cookie.c`: one XPath a known element), so ours, in a
//! namespace of its own, reaches the other plug-in, and does nothing to a host that has none. Never use
//! `<feature>` there: an unknown one is fatal.
//!
//! The cookie's length includes its final NUL, and the parser demands one.

use crate::cold::{Inventory, Malformed};
use crate::session::{Block, Encryption, Token, PAGE, VERSION};
use crate::xml::{text_of_reference, Attributes};
use base64::prelude::{Engine, BASE64_STANDARD};
use quick_xml::escape::escape;
use quick_xml::events::Event;
use quick_xml::name::ResolveResult;
use quick_xml::NsReader;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::ops::Range;
use uuid::Uuid;

/// The namespace of our elements; the last part is the version of their shape.
pub const NAMESPACE: &str = "https://virt-ferry.org/xmlns/migration/1";

/// libvirt's own limit on a cookie, in bytes (REMOTE_MIGRATE_COOKIE_MAX, libvirt 9.0 and 11.3).
pub const MAX_COOKIE: usize = 4 << 20;

/// RAM blocks in one guest: NUMA cells and DIMMs; QEMU allows 256 memory slots.
pub const MAX_BLOCKS: usize = 512;

/// A certificate's DER, in bytes; ours has about 400.
const MAX_CERTIFICATE: usize = 8 << 10;

/// The largest block accepted, in bytes: far beyond what x86 can address, far from overflowing a sum.
const MAX_BLOCK_SIZE: u64 = 1 << 52;

/// The largest page accepted, in bytes: the largest there is.
const MAX_PAGE: u64 = 1 << 34;

/// What the source's Begin says: this guest can move through the engines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// This migration.
    pub session: Uuid,
    /// The secret every connection of this migration shows.
    pub token: Token,
    /// What the source wants; the destination's answer decides.
    pub encryption: Encryption,
    /// The source's certificate for this session, DER; empty where libvirt's own are used.
    pub certificate: Vec<u8>,
    /// What will be moved.
    pub blocks: Vec<Block>,
}

/// What the destination's Prepare answers: its engine listens here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The session of the offer.
    pub session: Uuid,
    /// Whether this session is encrypted: with libvirt's certificates where the migration asks for them; else always,
    /// unless both hosts say never.
    pub encryption: Encryption,
    /// The destination's certificate for this session, DER; empty where libvirt's own are used.
    pub certificate: Vec<u8>,
    /// The host to connect to, a name or an address as in the migration URI.
    pub host: String,
    /// The TCP port of the destination's engine.
    pub port: u16,
}

/// What the source's Begin says of a guest that is shut off: its engine serves the guest's files here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColdOffer {
    /// This migration.
    pub session: Uuid,
    /// The secret every connection of this migration shows.
    pub token: Token,
    /// What the source wants; the destination connects encrypted unless both hosts say never.
    pub encryption: Encryption,
    /// The source's certificate for this session, DER.
    pub certificate: Vec<u8>,
    /// The host to connect to, a name or an address.
    pub host: String,
    /// The TCP port of the source's engine.
    pub port: u16,
    /// What the guest owns.
    pub inventory: Inventory,
}

/// What the destination's Prepare answers a cold offer: all of the guest's files are there, verified. Peer-to-peer only:
/// `virsh` throws this cookie away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColdAnswer {
    /// The session of the offer.
    pub session: Uuid,
}

/// A cookie with an element of ours that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a libvirt cookie at all.
    #[error("the migration cookie is malformed: {0}")]
    Cookie(String),
    /// Ours, but not as our schema has it.
    #[error("the virt-ferry element of the migration cookie is malformed: {0}")]
    Element(String),
    /// The other host speaks another version.
    #[error("the other host's virt-ferry speaks version {theirs}, this one {}", VERSION)]
    Version {
        /// The other host's version.
        theirs: u16,
    },
}

/// Adds an offer to the cookie of the real Begin.
pub fn with_offer(cookie: &[u8], offer: &Offer) -> Result<Vec<u8>, Error> {
    insert(cookie, &offer.element())
}

/// Adds an answer to the cookie of the real Prepare.
pub fn with_answer(cookie: &[u8], answer: &Answer) -> Result<Vec<u8>, Error> {
    insert(cookie, &answer.element())
}

/// The offer in a cookie; `None` where there is none.
pub fn offer(cookie: &[u8]) -> Result<Option<Offer>, Error> {
    Element::find(cookie, "offer")?.map(Offer::read).transpose()
}

/// The answer in a cookie; `None` where there is none.
pub fn answer(cookie: &[u8]) -> Result<Option<Answer>, Error> {
    Element::find(cookie, "answer")?.map(Answer::read).transpose()
}

/// Adds a cold offer to the cookie of the real Begin.
pub fn with_cold_offer(cookie: &[u8], offer: &ColdOffer) -> Result<Vec<u8>, Error> {
    insert(cookie, &offer.element()?)
}

/// Adds a cold answer to the cookie of the real Prepare.
pub fn with_cold_answer(cookie: &[u8], answer: ColdAnswer) -> Result<Vec<u8>, Error> {
    let session = answer.session;
    let element =
        format!("<ferry:cold-answer xmlns:ferry='{NAMESPACE}' version='{VERSION}' session='{session}'/>");
    insert(cookie, &element)
}

/// The cold offer in a cookie; `None` where there is none.
pub fn cold_offer(cookie: &[u8]) -> Result<Option<ColdOffer>, Error> {
    Element::find(cookie, "cold-offer")?
        .map(ColdOffer::read)
        .transpose()
}

/// The cold answer in a cookie; `None` where there is none.
pub fn cold_answer(cookie: &[u8]) -> Result<Option<ColdAnswer>, Error> {
    let read = |element: Element| {
        let session = element.head.parsed("session")?;
        Ok(ColdAnswer { session })
    };
    Element::find(cookie, "cold-answer")?.map(read).transpose()
}

/// The cookie that asks a peer whether it has the plug-in, sent to Prepare with no parameters: libvirt itself
/// refuses such a Prepare before it does anything ("no domain XML passed"), a plug-in answers with [`is_probe`]'s
/// cookie again.
pub fn probe() -> Vec<u8> {
    format!("<qemu-migration><ferry:probe xmlns:ferry='{NAMESPACE}' version='{VERSION}'/></qemu-migration>\0")
        .into_bytes()
}

/// Whether a cookie is a peer's probe, or the answer to ours, in our version.
pub fn is_probe(cookie: &[u8]) -> bool {
    matches!(Element::find(cookie, "probe"), Ok(Some(_)))
}

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

impl Offer {
    fn element(&self) -> String {
        let mut xml = format!(
            "<ferry:offer xmlns:ferry='{NAMESPACE}' version='{VERSION}' session='{}' token='{}' encryption='{}' certificate='{}'>",
            self.session,
            String::from(self.token.clone()),
            self.encryption,
            BASE64_STANDARD.encode(&self.certificate),
        );
        for block in &self.blocks {
            // Writing to a String cannot fail.
            let _ = write!(
                xml,
                "<ferry:memory block='{}' size='{}' resident='{}'",
                escape(&block.name),
                block.size,
                block.resident
            );
            if block.is_huge() {
                let _ = write!(xml, " page='{}'", block.page);
            }
            xml.push_str("/>");
        }
        xml.push_str("</ferry:offer>");
        xml
    }

    fn read(element: Element) -> Result<Self, Error> {
        let head = &element.head;
        let offer = Self {
            session: head.parsed("session")?,
            token: head.parsed("token")?,
            encryption: head.encryption()?,
            certificate: head.certificate()?,
            blocks: element.children.iter().map(block).collect::<Result<_, _>>()?,
        };
        if offer.blocks.is_empty() {
            return Err(Error::Element("it offers no memory".into()));
        }
        Ok(offer)
    }
}

impl Answer {
    fn element(&self) -> String {
        format!(
            "<ferry:answer xmlns:ferry='{NAMESPACE}' version='{VERSION}' session='{}' encryption='{}' certificate='{}' host='{}' port='{}'/>",
            self.session,
            self.encryption,
            BASE64_STANDARD.encode(&self.certificate),
            escape(&self.host),
            self.port,
        )
    }

    fn read(element: Element) -> Result<Self, Error> {
        let head = &element.head;
        let (host, port) = head.place()?;
        Ok(Self {
            session: head.parsed("session")?,
            encryption: head.encryption()?,
            certificate: head.certificate()?,
            host,
            port,
        })
    }
}

impl ColdOffer {
    fn element(&self) -> Result<String, Error> {
        Ok(format!(
            "<ferry:cold-offer xmlns:ferry='{NAMESPACE}' version='{VERSION}' session='{}' token='{}' encryption='{}' \
             certificate='{}' host='{}' port='{}'>{}</ferry:cold-offer>",
            self.session,
            String::from(self.token.clone()),
            self.encryption,
            BASE64_STANDARD.encode(&self.certificate),
            escape(&self.host),
            self.port,
            self.inventory.to_xml()?,
        ))
    }

    fn read(element: Element) -> Result<Self, Error> {
        let head = &element.head;
        let (host, port) = head.place()?;
        Ok(Self {
            session: head.parsed("session")?,
            token: head.parsed("token")?,
            encryption: head.encryption()?,
            certificate: head.certificate()?,
            host,
            port,
            inventory: element
                .inventory
                .ok_or_else(|| Error::Element("it has no inventory".into()))?,
        })
    }
}

fn block(head: &Attributes) -> Result<Block, Error> {
    let block = Block {
        name: head.text("block")?.to_owned(),
        size: head.parsed("size")?,
        resident: head.parsed("resident")?,
        page: head.optional("page")?.unwrap_or(PAGE),
    };
    let sane = !block.name.is_empty()
        && block.name.len() <= 255
        && block.size > 0
        && block.size <= MAX_BLOCK_SIZE
        && (PAGE..=MAX_PAGE).contains(&block.page)
        && block.page.is_power_of_two()
        && block.size.is_multiple_of(block.page)
        && block.resident <= block.size;
    sane.then_some(block)
        .ok_or_else(|| Error::Element("a memory block has an impossible name or size".into()))
}

impl From<Malformed> for Error {
    fn from(Malformed(what): Malformed) -> Self {
        Self::Element(what)
    }
}

/// One element of ours as read: its attributes, those of its `memory` children, and its inventory.
struct Element {
    head: Attributes,
    children: Vec<Attributes>,
    inventory: Option<Inventory>,
}

impl Attributes {
    fn encryption(&self) -> Result<Encryption, Error> {
        match self.text("encryption")? {
            "always" => Ok(Encryption::Always),
            "never" => Ok(Encryption::Never),
            "certificates" => Ok(Encryption::Certificates),
            _ => Err(Error::Element("attribute encryption cannot be read".into())),
        }
    }

    /// A host and a port to connect to.
    fn place(&self) -> Result<(String, u16), Error> {
        let (host, port) = (self.text("host")?, self.parsed("port")?);
        match !host.is_empty() && host.len() <= 255 && port != 0 {
            true => Ok((host.to_owned(), port)),
            false => Err(Error::Element("it names no host and port".into())),
        }
    }

    fn certificate(&self) -> Result<Vec<u8>, Error> {
        let text = self.text("certificate")?;
        if text.len() > MAX_CERTIFICATE * 4 / 3 {
            return Err(Error::Element("the certificate is too long".into()));
        }
        BASE64_STANDARD
            .decode(text)
            .map_err(|_| Error::Element("the certificate is not base64".into()))
    }
}

impl Element {
    /// The last child of the cookie's root with this name in our namespace. Malformed XML outside of our own
    /// element is libvirt's to judge, but an element of ours must be whole.
    fn find(cookie: &[u8], name: &str) -> Result<Option<Self>, Error> {
        let mut reader = NsReader::from_str(text(cookie)?);
        let mut depth = 0u32;
        let mut found: Option<Self> = None;
        let mut inside = false;
        loop {
            let (namespace, event) = reader
                .read_resolved_event()
                .map_err(|error| Error::Cookie(error.to_string()))?;
            let ours = matches!(namespace, ResolveResult::Bound(bound) if bound.into_inner() == NAMESPACE);
            match event {
                Event::Start(ref start) | Event::Empty(ref start) => {
                    let local = start.local_name();
                    if depth == 1 && ours && local.into_inner() == name {
                        let head = Attributes::read(start)?;
                        let theirs = head.parsed("version")?;
                        if theirs != VERSION {
                            return Err(Error::Version { theirs });
                        }
                        found = Some(Self {
                            head,
                            children: Vec::new(),
                            inventory: None,
                        });
                        inside = matches!(event, Event::Start(_));
                    } else if let (2, true, true, Some(element)) = (depth, ours, inside, found.as_mut()) {
                        if local.into_inner() == "inventory" && matches!(event, Event::Start(_)) {
                            let start = start.clone().into_owned();
                            element.inventory = Some(Inventory::read(&mut reader, &start)?);
                            // Read to its end.
                            continue;
                        }
                        if element.children.len() == MAX_BLOCKS {
                            return Err(Error::Element(format!(
                                "it has more than {MAX_BLOCKS} memory blocks"
                            )));
                        }
                        if local.into_inner() == "memory" {
                            element.children.push(Attributes::read(start)?);
                        }
                    }
                    if matches!(event, Event::Start(_)) {
                        depth += 1;
                    }
                }
                Event::End(_) => {
                    depth = depth.saturating_sub(1);
                    inside &= depth > 1;
                }
                Event::Eof => return Ok(found),
                _ => {}
            }
        }
    }
}

/// The cookie's text without its final NUL.
fn text(cookie: &[u8]) -> Result<&str, Error> {
    if cookie.len() > MAX_COOKIE {
        return Err(Error::Cookie(format!("it is longer than {MAX_COOKIE} bytes")));
    }
    let bytes = cookie
        .strip_suffix(b"\0")
        .ok_or_else(|| Error::Cookie("it does not end with NUL".into()))?;
    std::str::from_utf8(bytes).map_err(|_| Error::Cookie("it is not UTF-8".into()))
}

/// The cookie with an element of ours as the last child of its root.
fn insert(cookie: &[u8], element: &str) -> Result<Vec<u8>, Error> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const COOKIE: &[u8] = b"<qemu-migration>\n  <name>g</name>\n  <uuid>u</uuid>\n</qemu-migration>\n\0";

    fn an_offer() -> Offer {
        Offer {
            session: Uuid::from_u128(7),
            token: Token::new([3; 32]),
            encryption: Encryption::Always,
            certificate: vec![1, 2, 3, 255],
            blocks: vec![
                Block {
                    name: "pc.ram".into(),
                    size: 1 << 30,
                    resident: 1 << 20,
                    page: 2 << 20,
                },
                Block {
                    name: "odd<>&'\" name".into(),
                    size: PAGE,
                    resident: 0,
                    page: PAGE,
                },
            ],
        }
    }

    fn an_answer() -> Answer {
        Answer {
            session: Uuid::from_u128(7),
            encryption: Encryption::Never,
            certificate: vec![9; 400],
            host: "fe80::1%eth0".into(),
            port: 49152,
        }
    }

    #[test]
    fn what_is_put_in_comes_out() {
        let cookie = with_offer(COOKIE, &an_offer()).unwrap();
        assert_eq!(cookie.last(), Some(&0));
        assert_eq!(offer(&cookie), Ok(Some(an_offer())));
        assert_eq!(answer(&cookie), Ok(None));
        let cookie = with_answer(COOKIE, &an_answer()).unwrap();
        assert_eq!(answer(&cookie), Ok(Some(an_answer())));
        for encryption in [Encryption::Always, Encryption::Never, Encryption::Certificates] {
            let protected = Offer {
                encryption,
                certificate: Vec::new(),
                ..an_offer()
            };
            let cookie = with_offer(COOKIE, &protected).unwrap();
            assert_eq!(offer(&cookie), Ok(Some(protected)));
        }
    }

    #[test]
    fn a_plain_cookie_has_nothing_of_ours() {
        assert_eq!(offer(COOKIE), Ok(None));
        assert!(!is_probe(COOKIE));
        assert!(is_probe(&probe()));
    }

    #[test]
    fn an_element_deeper_down_or_of_another_namespace_is_not_ours() {
        let ours = an_offer().element();
        let deeper = format!("<qemu-migration><x>{ours}</x></qemu-migration>\0");
        assert_eq!(offer(deeper.as_bytes()), Ok(None));
        let other = String::from_utf8(with_offer(COOKIE, &an_offer()).unwrap()).unwrap();
        let other = other.replace(NAMESPACE, "https://example.org/");
        assert_eq!(offer(other.as_bytes()), Ok(None));
    }

    #[test]
    fn figures_are_added_to_libvirts() {
        let job = |statistics: &str| {
            format!(
                "<qemu-migration>\n  <x><statistics>1</statistics></x>\n{statistics}</qemu-migration>\n\0"
            )
        };
        let told = job("  <statistics>\n    <memory_total>7</memory_total>\n  </statistics>\n");
        let figures = [("memory_total", 100), ("memory_constant", 3)];
        let told = String::from_utf8(with_figures(told.as_bytes(), figures).unwrap()).unwrap();
        assert_eq!(
            told,
            job("  <statistics>\n    <memory_total>107</memory_total>\n  <memory_constant>3</memory_constant></statistics>\n")
        );
        let none = job("");
        assert_eq!(with_figures(none.as_bytes(), figures).unwrap(), none.as_bytes());
    }

    #[test]
    fn another_version_is_named() {
        let cookie = String::from_utf8(with_offer(COOKIE, &an_offer()).unwrap()).unwrap();
        let cookie = cookie.replace("version='1'", "version='2'");
        assert_eq!(offer(cookie.as_bytes()), Err(Error::Version { theirs: 2 }));
    }

    #[test]
    fn malformed_elements_are_refused() {
        let good = String::from_utf8(with_offer(COOKIE, &an_offer()).unwrap()).unwrap();
        for (from, to) in [
            ("token='03", "token='0x"),
            ("session='00000000", "session='zz"),
            ("encryption='always'", "encryption='maybe'"),
            ("certificate='AQID", "certificate='*"),
            ("size='4096'", "size='4097'"),
            ("size='4096'", "size='-1'"),
            ("size='4096'", "size='99999999999999999999'"),
            ("resident='0'", "resident='8192'"),
            ("page='2097152'", "page='0'"),
            ("page='2097152'", "page='3145728'"),
            ("page='2097152'", "page='2147483648'"),
            ("page='2097152'", "page='99999999999999999999'"),
            ("block='pc.ram'", "block=''"),
            ("block='pc.ram' ", ""),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from}");
            assert!(
                matches!(offer(bad.as_bytes()), Err(Error::Element(_))),
                "{from} -> {to}"
            );
        }
        let cut = &good.as_bytes()[..good.len() / 2];
        assert!(matches!(offer(cut), Err(Error::Cookie(_))));
    }

    #[test]
    fn every_cut_and_every_flip_is_survived() {
        let good = with_offer(COOKIE, &an_offer()).unwrap();
        for index in 0..good.len() {
            let _ = offer(&good[..index]);
            let mut bad = good.clone();
            bad[index] ^= 0x15;
            let _ = offer(&bad);
            let _ = insert(&bad, "<x/>");
            let _ = with_figures(&bad, [("name", 1)]);
        }
    }

    #[test]
    fn bounds_hold() {
        let huge = [vec![b' '; MAX_COOKIE], vec![0]].concat();
        assert!(matches!(offer(&huge), Err(Error::Cookie(_))));
        let many = "<f:memory block='b' size='4096' resident='0'/>".repeat(MAX_BLOCKS + 1);
        let head = an_offer().element();
        let head = &head[..head.find('>').unwrap()];
        let cookie =
            format!("<qemu-migration>{head} xmlns:f='{NAMESPACE}'>{many}</ferry:offer></qemu-migration>\0");
        assert!(matches!(offer(cookie.as_bytes()), Err(Error::Element(_))));
    }
}
