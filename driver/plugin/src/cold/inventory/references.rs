//! What guests refer to, by definition, snapshot or image header: nothing of it may be deleted.

use super::{external, is_absent, is_shared, migrations, plain, DEFINITIONS, TPM};
use crate::cold::definition::Definition;
use crate::cold::image::{self, Layer};
use crate::cold::pools;
use crate::libvirt::{self, Connection, Domain};
use ferry_contract::cold::journal;
use ferry_contract::cold::Kept;
use ferry_host as host;
use roxmltree::Document;
use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Where libvirt keeps the state of guests that run, each with its definition.
const RUNNING: &str = "/run/libvirt/qemu";
/// For looking at the images of all other guests.
const OTHERS: Duration = Duration::from_secs(120);

/// Every file that this host's other guests refer to, by definition, snapshot or image header, or that the journal of one's
/// migration counts on; and what this guest's own journal has of bases that other hosts' guests may need. Each with who does.
///
/// # Errors
/// If a guest or a journal cannot be looked at: then nothing is certain.
pub fn others(connection: Connection, guest: Uuid) -> Result<Vec<Kept>, String> {
    let failed = |error: libvirt::Error| format!("the host's other guests cannot be looked at: {error}");
    let mut used = Used::new(connection);
    // Before the list: a guest whose journal has gone by then is in it.
    let journals = host::state_directory()?.join(journal::DIRECTORY);
    used.paths = migrations::counted_on(&journals, guest, is_shared)?;
    let mut seen = HashSet::from([guest]);
    for domain in connection.domains().map_err(failed)? {
        let domain = domain.get();
        let other = domain
            .guest()
            .ok_or("libvirt lists a guest without a name or UUID")?;
        if !seen.insert(other.uuid) {
            continue;
        }
        match used.by(domain, &other.name) {
            Ok(()) => {}
            // Undefined, or ended, since it was listed.
            Err(_)
                if connection
                    .domain(other.uuid)
                    .is_err_and(|error| error.is_no_domain()) => {}
            Err(why) => return Err(format!("guest {} cannot be looked at: {why}", other.name)),
        }
    }
    // After the list: one that is defined in between is missed in it, and found here.
    for directory in [DEFINITIONS, RUNNING] {
        all_seen(Path::new(directory), &seen)?;
    }
    Ok(used.kept())
}

/// Every file that this guest refers to.
///
/// # Errors
/// If it cannot be looked at: then nothing is certain.
pub fn of(domain: Domain, name: &str) -> Result<Vec<Kept>, String> {
    let mut used = Used::new(domain.connection());
    used.by(domain, name)?;
    Ok(used.kept())
}

/// libvirt lists only the guests that a call's user may see (fine-grained access control): all that it has files of must
/// have been among them.
fn all_seen(directory: &Path, seen: &HashSet<Uuid>) -> Result<(), String> {
    let failed = |path: &Path, why: &dyn std::fmt::Display| format!("{}: {why}", path.display());
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(directory, &error)),
    };
    for entry in entries {
        let path = entry.map_err(|error| failed(directory, &error))?.path();
        if path.extension().is_none_or(|extension| extension != "xml") || path.is_dir() {
            continue;
        }
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&path, &error)),
        };
        let uuid = uuid_in(&text).ok_or_else(|| failed(&path, &"it has no guest's UUID"))?;
        if !seen.contains(&uuid) {
            return Err(failed(
                &path,
                &"libvirt does not show this guest to the migration's user, so that what it refers to is not known",
            ));
        }
    }
    Ok(())
}

/// Of a definition, or of a definition within the state of a running guest.
fn uuid_in(xml: &str) -> Option<Uuid> {
    let document = Document::parse(xml).ok()?;
    let domain = document
        .root_element()
        .descendants()
        .find(|node| node.has_tag_name("domain"))?;
    let uuid = domain.children().find(|child| child.has_tag_name("uuid"))?;
    uuid.text()?.trim().parse().ok()
}

/// What guests refer to, as far as they have been looked at.
struct Used {
    connection: Connection,
    deadline: Instant,
    /// Each with why it stays.
    paths: BTreeMap<PathBuf, String>,
    /// Of the guest that is looked at.
    reason: String,
}

impl Used {
    fn new(connection: Connection) -> Self {
        Self {
            connection,
            deadline: Instant::now() + OTHERS,
            paths: BTreeMap::new(),
            reason: String::new(),
        }
    }

    fn kept(self) -> Vec<Kept> {
        sayable(self.paths)
    }

    /// Looks at one guest: as it will be when it starts, as it is where it runs, and as its snapshots have it.
    fn by(&mut self, domain: Domain, name: &str) -> Result<(), String> {
        self.reason = format!("guest {name} refers to it");
        let failed = |error: libvirt::Error| error.to_string();
        self.definition(&domain.definition().map_err(failed)?)?;
        if !domain.is_shut_off().map_err(failed)? {
            self.definition(&domain.running().map_err(failed)?)?;
        }
        for snapshot in domain.snapshots().map_err(failed)? {
            self.named(&snapshot.xml)?;
            for (path, format) in external(&snapshot.xml)? {
                self.image(&path, &format)?;
            }
        }
        Ok(())
    }

    fn definition(&mut self, xml: &str) -> Result<(), String> {
        self.named(xml)?;
        let definition = Definition::read(xml).map_err(|error| error.to_string())?;
        if let Some(tpm) = &definition.tpm {
            let own = Path::new(TPM).join(definition.uuid.to_string());
            self.below(tpm.source.as_deref().unwrap_or(&own), 2);
        }
        for disk in &definition.disks {
            let path = pools::path_of(self.connection, &disk.source)
                .map_err(|why| format!("disk {}: {why}", disk.target))?;
            if let Some(path) = path {
                self.image(&path, &disk.format)?;
            }
        }
        Ok(())
    }

    /// As the kernel finds it from what it is called, and as its text says: who uses these looks at what each is.
    fn add(&mut self, path: PathBuf) {
        self.insert(plain(&path));
        self.insert(path);
    }

    /// Who was looked at first is named.
    fn insert(&mut self, path: PathBuf) {
        self.paths.entry(path).or_insert_with(|| self.reason.clone());
    }

    fn named(&mut self, xml: &str) -> Result<(), String> {
        named(xml)?.into_iter().for_each(|path| self.insert(path));
        Ok(())
    }

    /// Files in a directory, so many levels deep.
    fn below(&mut self, directory: &Path, levels: u8) {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            match levels {
                1.. if entry.path().is_dir() => self.below(&entry.path(), levels - 1),
                _ => self.insert(entry.path()),
            }
        }
    }

    /// An image and all that its header, and theirs, name.
    fn image(&mut self, path: &Path, format: &str) -> Result<(), String> {
        if Instant::now() > self.deadline {
            return Err(format!(
                "looking at other guests' images took longer than {} s",
                OTHERS.as_secs()
            ));
        }
        self.add(path.to_owned());
        let layers = match image::layers(path, format) {
            Ok(layers) => layers,
            // One that is not there refers to nothing; of one that cannot be read, nobody knows.
            Err(_) if is_absent(path) => return Ok(()),
            Err(why) => return Err(why),
        };
        layers
            .iter()
            .flat_map(Layer::files)
            .for_each(|path| self.add(path));
        Ok(())
    }
}

/// What the engine can be told of these: a name that is no text is none of a file that moves, for these come with text.
fn sayable(paths: BTreeMap<PathBuf, String>) -> Vec<Kept> {
    let paths = paths.into_iter().filter(|(path, _)| path.to_str().is_some());
    paths.map(|(path, reason)| Kept { path, reason }).collect()
}

/// Every absolute path in an XML, as it [stands there](written) and without `..`: too many keep a file, too few lose one.
///
/// # Errors
/// It is no XML.
pub fn named(xml: &str) -> Result<HashSet<PathBuf>, String> {
    let written = written(xml)?.into_iter();
    Ok(written.flat_map(|path| [plain(&path), path]).collect())
}

/// Every absolute path in an XML, whatever it is there for, and those within arguments (`-drive file=/a,format=raw`).
///
/// # Errors
/// It is no XML.
pub fn written(xml: &str) -> Result<HashSet<PathBuf>, String> {
    let document = Document::parse(xml).map_err(|error| format!("libvirt's XML: {error}"))?;
    let nodes = document.descendants();
    let values = nodes.flat_map(|node| {
        let attributes = node.attributes().map(|attribute| attribute.value());
        attributes.chain(node.text().map(str::trim))
    });
    let parts = values.flat_map(|value| std::iter::once(value).chain(value.split(['=', ',', ' ', ':'])));
    Ok(parts
        .filter(|part| part.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_another_guest_names_is_found() {
        let xml = "<domain><uuid>00000000-0000-0000-0000-000000000007</uuid><devices><disk><source file='/a/./b'/>\
                   <mirror file='/m'/></disk><memory><source><path> /nv </path></source></memory></devices>\
                   <commandline><arg value='-drive'/><arg value='id=x,file=/q/disk,format=raw'/></commandline></domain>";
        let mut paths: Vec<_> = named(xml).unwrap().into_iter().collect();
        paths.sort();
        assert_eq!(paths, ["/a/b", "/m", "/nv", "/q/disk"].map(PathBuf::from));
        assert_eq!(uuid_in(xml), Some(Uuid::from_u128(7)));
        assert!(named("<domain").is_err());
    }

    #[test]
    fn a_name_that_is_no_text_keeps_no_engine_from_its_work() {
        use std::os::unix::ffi::OsStrExt;
        let odd = Path::new(std::ffi::OsStr::from_bytes(b"/tpm/\xff"));
        let paths = [Path::new("/tpm/a"), odd].map(|path| (path.to_owned(), "why".to_owned()));
        let kept = sayable(paths.into());
        assert!(serde_json::to_vec(&kept).is_ok());
        assert!(kept.iter().map(|kept| &kept.path).eq([Path::new("/tpm/a")]));
    }

    #[test]
    fn a_guest_that_is_not_shown_leaves_nothing_certain() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        let domain = |number: u128| format!("<domain><uuid>{}</uuid></domain>", Uuid::from_u128(number));
        let seen = HashSet::from([Uuid::from_u128(1), Uuid::from_u128(2)]);
        std::fs::create_dir(directory.path().join("autostart.xml")).unwrap();
        write("one.xml", &format!("<!-- libvirt's -->\n{}", domain(1)));
        write(
            "two.xml",
            &format!("<domstatus state='running'>{}</domstatus>", domain(2)),
        );
        write("driver.pid", "7");
        assert_eq!(all_seen(directory.path(), &seen), Ok(()));
        assert_eq!(all_seen(Path::new("/no/such/directory"), &seen), Ok(()));
        write("three.xml", &domain(3));
        assert!(all_seen(directory.path(), &seen)
            .unwrap_err()
            .contains("three.xml"));
        write("three.xml", "");
        assert!(all_seen(directory.path(), &seen).is_err());
    }
}
