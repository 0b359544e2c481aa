//! Elements of ours, as they are written and read.

use super::libvirts::text;
use super::{Answer, ColdAnswer, ColdOffer, Error, Offer, MAX_BLOCKS, NAMESPACE};
use crate::cold::Inventory;
use crate::session::{Block, Encryption, PAGE, VERSION};
use crate::xml::{is_ours, Attributes};
use base64::prelude::{Engine, BASE64_STANDARD};
use quick_xml::escape::escape;
use quick_xml::events::Event;
use quick_xml::NsReader;
use std::fmt::Write;

/// A certificate's DER, in bytes; ours has about 400.
const MAX_CERTIFICATE: usize = 8 << 10;

/// The largest block accepted, in bytes: far beyond what x86 can address, far from overflowing a sum.
const MAX_BLOCK_SIZE: u64 = 1 << 52;

/// The largest page accepted, in bytes: the largest there is.
const MAX_PAGE: u64 = 1 << 34;

impl Offer {
    pub(super) fn element(&self) -> String {
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

    pub(super) fn read(element: Element) -> Result<Self, Error> {
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
    pub(super) fn element(&self) -> String {
        format!(
            "<ferry:answer xmlns:ferry='{NAMESPACE}' version='{VERSION}' session='{}' encryption='{}' certificate='{}' host='{}' port='{}'/>",
            self.session,
            self.encryption,
            BASE64_STANDARD.encode(&self.certificate),
            escape(&self.host),
            self.port,
        )
    }

    pub(super) fn read(element: Element) -> Result<Self, Error> {
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
    pub(super) fn element(&self) -> Result<String, Error> {
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

    pub(super) fn read(element: Element) -> Result<Self, Error> {
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

impl ColdAnswer {
    pub(super) fn element(self) -> String {
        let session = self.session;
        format!("<ferry:cold-answer xmlns:ferry='{NAMESPACE}' version='{VERSION}' session='{session}'/>")
    }

    pub(super) fn read(element: Element) -> Result<Self, Error> {
        let session = element.head.parsed("session")?;
        Ok(Self { session })
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

/// One element of ours as read: its attributes, those of its `memory` children, and its inventory.
pub(super) struct Element {
    head: Attributes,
    children: Vec<Attributes>,
    inventory: Option<Inventory>,
}

impl Element {
    /// The last child of the cookie's root with this name in our namespace. Malformed XML outside of our own
    /// element is libvirt's to judge, but an element of ours must be whole.
    pub(super) fn find(cookie: &[u8], name: &str) -> Result<Option<Self>, Error> {
        let mut reader = NsReader::from_str(text(cookie)?);
        let mut depth = 0u32;
        let mut found: Option<Self> = None;
        let mut inside = false;
        loop {
            let (namespace, event) = reader
                .read_resolved_event()
                .map_err(|error| Error::Cookie(error.to_string()))?;
            let ours = is_ours(&namespace);
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
