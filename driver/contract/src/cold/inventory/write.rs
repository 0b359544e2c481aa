//! An inventory as XML.

use super::{is_xml, malformed, File, Inventory, Malformed, Part};
use crate::cookie::NAMESPACE;
use quick_xml::escape::escape;
use std::fmt::Write;
use std::path::Path;

impl Inventory {
    /// As XML.
    ///
    /// # Errors
    /// Names that no XML can carry; more than the schema allows.
    pub fn to_xml(&self) -> Result<String, Malformed> {
        let mut xml = String::new();
        // Writing to a String cannot fail.
        let _ = write!(
            xml,
            "<ferry:inventory xmlns:ferry='{NAMESPACE}' name='{}' uuid='{}' autostart='{}'>",
            escape(&self.guest.name),
            self.guest.uuid,
            yes(self.autostart),
        );
        for file in &self.files {
            file.write(&mut xml)?;
        }
        for directory in &self.directories {
            let _ = write!(
                xml,
                "<ferry:directory path='{}' mode='{:o}' owner='{}' group='{}'/>",
                escape(writable(&directory.path)?),
                directory.mode,
                escape(&directory.owner),
                escape(&directory.group)
            );
        }
        for medium in &self.media {
            let _ = write!(
                xml,
                "<ferry:medium target='{}' path='{}'/>",
                escape(&medium.target),
                escape(writable(&medium.path)?)
            );
        }
        for metadata in &self.metadata {
            let _ = write!(
                xml,
                "<ferry:{kind} name='{}' current='{}'>{}</ferry:{kind}>",
                escape(&metadata.name),
                yes(metadata.current),
                escape(&metadata.xml),
                kind = metadata.kind.name(),
            );
        }
        xml.push_str("</ferry:inventory>");
        // What the other side would refuse is better refused here.
        Self::from_xml(&xml)
            .map_err(|Malformed(what)| malformed(format!("{what} (of {})", self.guest.name)))?;
        Ok(xml)
    }
}

impl File {
    fn write(&self, xml: &mut String) -> Result<(), Malformed> {
        let _ = write!(xml, "<ferry:file path='{}'", escape(writable(&self.path)?));
        let _ = match &self.part {
            Part::Disk {
                target,
                layer,
                format,
                relative,
            } => write!(
                xml,
                " part='disk' target='{}' layer='{layer}' format='{}' relative='{}'",
                escape(target),
                escape(format),
                yes(*relative)
            ),
            Part::Data {
                target,
                layer,
                relative,
            } => write!(
                xml,
                " part='data' target='{}' layer='{layer}' relative='{}'",
                escape(target),
                yes(*relative)
            ),
            Part::Nvram => write!(xml, " part='nvram'"),
            Part::Tpm => write!(xml, " part='tpm'"),
            Part::Log => write!(xml, " part='log'"),
            Part::Other => write!(xml, " part='other'"),
        };
        let _ = write!(
            xml,
            " kind='{}' size='{}' allocated='{}'/>",
            self.kind.name(),
            self.size,
            self.allocated
        );
        Ok(())
    }
}

/// A path or name as it can stand in XML.
fn writable(path: &Path) -> Result<&str, Malformed> {
    path.to_str()
        .filter(|path| path.chars().all(is_xml))
        .ok_or_else(|| malformed(format!("{} cannot be written as XML: rename it", path.display())))
}

fn yes(flag: bool) -> &'static str {
    match flag {
        true => "yes",
        false => "no",
    }
}
