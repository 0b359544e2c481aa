//! What a guest owns, found from its definition, its images' headers and libvirt's own directories.
//!
//! Nothing is guessed: a file that a header or the definition names and that is not a file of this host ends the
//! migration, before anything was touched. How large the files are and whether somebody writes to them is the engine's
//! to find out.

use super::definition::{Definition, Disk, Source};
use super::image::{self, Layer};
use super::pools;
use crate::libvirt::{self, Connection, Domain};
use ferry_contract::cold::journal::{self, Journal, Role};
use ferry_contract::cold::{self, Item, Kept, Medium, Metadata, MetadataKind, Part};
use ferry_host as host;
use nix::errno::Errno;
use nix::sys::statfs::statfs;
use roxmltree::Document;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Where libvirt keeps the state of emulated TPMs, unless a definition says otherwise.
pub const TPM: &str = "/var/lib/libvirt/swtpm";
/// Where QEMU's and swtpm's logs are.
pub const LOGS: [&str; 2] = ["/var/log/libvirt/qemu", "/var/log/swtpm/libvirt/qemu"];
/// Definitions of QEMU's guests.
const DEFINITIONS: &str = "/etc/libvirt/qemu";
/// Those that run, as they are.
const RUNNING: &str = "/run/libvirt/qemu";
/// File systems that other hosts may have, too, by what statfs(2) says of their kind (Linux 6.12, `linux/magic.h` and each
/// file system's own): NFS, SMB/CIFS (three), Ceph, GFS2, OCFS2, FUSE (GlusterFS), Lustre, 9p, AFS (two).
const NETWORK: [u32; 12] = [
    0x6969,
    0xff53_4d42,
    0xfe53_4d42,
    0x517b,
    0x00c3_6400,
    0x0116_1970,
    0x7461_636f,
    0x6573_5546,
    0x0bd0_0bd0,
    0x0102_1997,
    0x5346_414f,
    0x6b41_4653,
];
/// Why a base stays where other hosts' guests, which are not known here, may need it.
pub const OTHER_HOSTS: &str = "it is on a network file system, where guests of other hosts may stand on it";
/// For looking at the images of all other guests.
const OTHERS: Duration = Duration::from_secs(120);

/// What a guest owns and needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// What moves.
    pub items: Vec<Item>,
    /// What must be at the destination.
    pub media: Vec<Medium>,
    /// Snapshots and checkpoints.
    pub metadata: Vec<Metadata>,
}

/// Looks at a guest that is shut off. Where `disks` names some, the others must be at the destination already
/// (`--migrate-disks`).
///
/// # Errors
/// Why it cannot be moved, in a sentence.
pub fn take(domain: Domain, guest: &Definition, disks: &[&str]) -> Result<Found, String> {
    if let [first, ..] = guest.unmovable.as_slice() {
        return Err(first.clone());
    }
    if let Some(unknown) = disks.iter().find(|target| guest.disk(target).is_none()) {
        return Err(format!("it has no disk {unknown}"));
    }
    let mut found = Found::default();
    let homes = Homes::of(domain.connection(), guest);
    for disk in &guest.disks {
        let moves = !disk.media && (disks.is_empty() || disks.contains(&disk.target.as_str()));
        found.disk(domain.connection(), disk, moves, &homes)?;
    }
    for path in &guest.needed {
        found.media.push(Medium {
            target: needed(path),
            path: path.clone(),
        });
    }
    for path in guest.nvram.iter().filter(|path| path.exists()) {
        found.item(certain(path)?, Part::Nvram);
    }
    if let Some(tpm) = &guest.tpm {
        let own = Path::new(TPM).join(guest.uuid.to_string());
        let path = tpm.source.clone().unwrap_or(own);
        if path.exists() {
            found.item(certain(&path)?, Part::Tpm);
        }
    }
    for path in logs(&guest.name) {
        found.item(path, Part::Log);
    }
    found.metadata(domain, homes)?;
    Ok(found)
}

/// What a needed file is called in messages.
pub fn needed(path: &Path) -> String {
    path.file_name()
        .map_or_else(|| "file".into(), |name| name.to_string_lossy().into_owned())
}

/// A path without `.`, `..` and doubled slashes, as headers may have them.
pub fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

/// A path as [`plain`] has it, where that is the same file: behind a symlink to a directory, the kernel and QEMU find
/// another by `..` than its text says.
///
/// # Errors
/// It is not, and nobody knows which of both would be copied or deleted.
pub fn certain(path: &Path) -> Result<PathBuf, String> {
    let plain = plain(path);
    // Neither is there: that is the engine's to name.
    match path.canonicalize().ok() == plain.canonicalize().ok() {
        true => Ok(plain),
        false => Err(format!(
            "{} leads through a symlink to another file than {}: name it without \"..\" (qemu-img rebase -u for a backing \
             file)",
            path.display(),
            plain.display()
        )),
    }
}

/// Whether every file of these layers is the one that its name says.
///
/// # Errors
/// See [`certain`].
pub fn all_certain(layers: &[Layer]) -> Result<(), String> {
    layers
        .iter()
        .flat_map(Layer::files)
        .try_for_each(|path| certain(&path).map(drop))
}

/// What is a guest's to take along: the files that its definition names, and what is in their directories or in those of
/// active storage pools. A header may name any other file of the host, and the guest's owner may have written it.
#[derive(Default)]
pub struct Homes {
    named: HashSet<PathBuf>,
    directories: Vec<PathBuf>,
}

impl Homes {
    /// Those of this guest.
    pub fn of(connection: Connection, guest: &Definition) -> Self {
        let mut homes = Self::default();
        for target in pools::targets(connection) {
            homes.directory(&target);
        }
        for disk in guest.disks.iter().filter(|disk| !disk.media) {
            let sources = std::iter::once(&disk.source)
                .chain(&disk.layers)
                .chain(&disk.data);
            for path in sources.filter_map(|source| pools::path_of(connection, source).ok()?) {
                homes.add(&path);
            }
        }
        homes
    }

    /// A file that the definition names.
    fn add(&mut self, path: &Path) {
        let real = path.canonicalize();
        for name in [path].into_iter().chain(real.as_deref().ok()) {
            name.parent()
                .into_iter()
                .for_each(|parent| self.directory(parent));
        }
        self.named.extend(real);
    }

    fn directory(&mut self, path: &Path) {
        let real = path.canonicalize().ok();
        // Everything is below the root, and every disk of the host's in the other.
        let real = real.filter(|real| real.parent().is_some() && real != Path::new("/dev"));
        self.directories.extend(real);
    }

    /// Whether all of these layers' files are.
    ///
    /// # Errors
    /// Which is not, and what to do.
    pub fn have(&self, layers: &[Layer]) -> Result<(), String> {
        for path in layers.iter().flat_map(Layer::files) {
            // What is not there is the engine's to name.
            let Ok(real) = path.canonicalize() else { continue };
            let is_home = self.directories.iter().any(|home| real.starts_with(home));
            if !is_home && !self.named.contains(&real) {
                return Err(format!(
                    "only an image's header names {}, which is neither in a directory of the guest's disks nor in a storage \
                     pool: if it is the guest's, name it in the definition (<backingStore>, <dataStore>), or make its directory \
                     a pool (virsh pool-create-as NAME dir --target DIRECTORY)",
                    path.display()
                ));
            }
        }
        Ok(())
    }
}

/// Whether guests of other hosts may stand on this file, of which this host knows nothing: it is on a network or cluster
/// file system.
pub fn is_shared(path: &Path) -> bool {
    match statfs(path) {
        Ok(found) => NETWORK.contains(&(found.filesystem_type().0 as u32)),
        // What is not there is nobody's; of the rest, nobody knows.
        Err(error) => !matches!(error, Errno::ENOENT | Errno::ENOTDIR),
    }
}

impl Found {
    /// Adds a file, once.
    fn item(&mut self, path: PathBuf, part: Part) {
        let path = plain(&path);
        if !self.items.iter().any(|item| item.path == path) {
            self.items.push(Item { path, part });
        }
    }

    fn disk(
        &mut self,
        connection: Connection,
        disk: &Disk,
        moves: bool,
        homes: &Homes,
    ) -> Result<(), String> {
        let Some(path) =
            pools::path_of(connection, &disk.source).map_err(|why| format!("disk {}: {why}", disk.target))?
        else {
            return Ok(());
        };
        if !moves {
            self.media.push(Medium {
                target: disk.target.clone(),
                path,
            });
            return Ok(());
        }
        let layers =
            image::layers(&path, &disk.format).map_err(|why| format!("disk {}: {why}", disk.target))?;
        agree(disk, &layers)?;
        all_certain(&layers)
            .and_then(|()| homes.have(&layers))
            .map_err(|why| format!("disk {}: {why}", disk.target))?;
        self.layers(&disk.target, &layers);
        Ok(())
    }

    fn layers(&mut self, target: &str, layers: &[Layer]) {
        let mut relative = false;
        for (number, layer) in layers.iter().enumerate() {
            let number = number as u16;
            let part = Part::Disk {
                target: target.to_owned(),
                layer: number,
                format: layer.format.clone(),
                relative,
            };
            self.item(layer.path.clone(), part);
            if let Some(data) = &layer.data_file {
                let part = Part::Data {
                    target: target.to_owned(),
                    layer: number,
                    relative: data.is_relative(),
                };
                self.item(Layer::beside(&layer.path, data), part);
            }
            relative = layer.backing.as_deref().is_some_and(Path::is_relative);
        }
    }

    fn metadata(&mut self, domain: Domain, mut homes: Homes) -> Result<(), String> {
        self.metadata = metadata(domain)?;
        let snapshots = self
            .metadata
            .iter()
            .filter(|one| one.kind == MetadataKind::Snapshot);
        let files: Vec<_> = snapshots.map(|one| external(&one.xml)).collect();
        for files in files {
            for (path, format) in files? {
                if !path.exists() {
                    return Err(format!(
                        "{}, a file of one of its snapshots, does not exist: virsh snapshot-delete --metadata",
                        path.display()
                    ));
                }
                let layers = image::layers(&path, &format)?;
                all_certain(&layers)?;
                homes.add(&path);
                homes.have(&layers)?;
                for layer in layers {
                    let data = layer
                        .data_file
                        .as_ref()
                        .map(|data| Layer::beside(&layer.path, data));
                    self.item(layer.path, Part::Other);
                    data.into_iter().for_each(|data| self.item(data, Part::Other));
                }
            }
        }
        Ok(())
    }
}

/// The guest's snapshots and checkpoints, parents before children.
///
/// # Errors
/// libvirt does not describe one.
pub fn metadata(domain: Domain) -> Result<Vec<Metadata>, String> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: libvirt::Error| format!("libvirt does not describe its {what}: {error}")
    };
    let snapshots = domain.snapshots().map_err(failed("snapshots"))?;
    let checkpoints = domain.checkpoints().map_err(failed("checkpoints"))?;
    let of = |kind, list: Vec<libvirt::Metadata>| {
        list.into_iter().map(move |one| {
            Ok(Metadata {
                kind,
                name: name(&one.xml)?,
                current: one.current,
                xml: one.xml,
            })
        })
    };
    of(MetadataKind::Snapshot, snapshots)
        .chain(of(MetadataKind::Checkpoint, checkpoints))
        .collect()
}

/// What the definition says of a disk's layers must be what the headers say: QEMU goes by the former, we by the latter.
pub fn agree(disk: &Disk, layers: &[Layer]) -> Result<(), String> {
    let named: Vec<_> = disk.layers.iter().map(Source::path).collect();
    let found = layers.iter().skip(1).map(|layer| layer.path.as_path());
    let real = |path: &Path| path.canonicalize().ok();
    let same = |(named, found): (&Option<&Path>, &Path)| {
        named.is_some_and(|named| plain(named) == plain(found) && real(named) == real(found))
    };
    if named.is_empty() && !disk.ends || named.len() == layers.len() - 1 && named.iter().zip(found).all(same)
    {
        return Ok(());
    }
    Err(format!(
        "disk {}: the layers in the guest's definition are not those in the images' headers; remove <backingStore> from \
         the definition, or correct the headers with qemu-img rebase -u",
        disk.target
    ))
}

fn name(xml: &str) -> Result<String, String> {
    let document = Document::parse(xml).map_err(|error| format!("libvirt's snapshot XML: {error}"))?;
    let root = document.root_element();
    let name = root.children().find(|child| child.has_tag_name("name"));
    name.and_then(|name| name.text())
        .map(str::to_owned)
        .ok_or_else(|| "libvirt describes a snapshot without a name".into())
}

/// Files of an external snapshot: memory, and the images that it made.
///
/// # Errors
/// It is no XML.
pub fn external(xml: &str) -> Result<Vec<(PathBuf, String)>, String> {
    let document = Document::parse(xml).map_err(|error| format!("libvirt's snapshot XML: {error}"))?;
    let root = document.root_element();
    let mut files = Vec::new();
    for element in root
        .children()
        .filter(|child| child.attribute("snapshot") == Some("external"))
    {
        files.extend(element.attribute("file").map(|file| (file.into(), "raw".into())));
    }
    let disks = root.children().filter(|child| child.has_tag_name("disks"));
    let disks = disks.flat_map(|disks| disks.children());
    for disk in disks.filter(|disk| disk.attribute("snapshot") == Some("external")) {
        let of = |name| {
            disk.children()
                .find(|child: &roxmltree::Node| child.has_tag_name(name))
        };
        let format = of("driver").and_then(|driver| driver.attribute("type"));
        let source = of("source").and_then(|source| source.attribute("file").or(source.attribute("dev")));
        if let Some(path) = source {
            files.push((path.into(), format.unwrap_or("qcow2").to_owned()));
        }
    }
    Ok(files)
}

/// The guest's logs, rotated ones among them, as libvirt 11.3 names them.
fn logs(guest: &str) -> Vec<PathBuf> {
    let [qemu, swtpm] = LOGS.map(Path::new);
    let log = format!("{guest}.log");
    let mut found: Vec<_> = std::iter::once(qemu.join(&log))
        .chain((0..10).map(|number| qemu.join(format!("{log}.{number}"))))
        .chain([swtpm.join(format!("{guest}-swtpm.log"))])
        .collect();
    found.retain(|path| path.symlink_metadata().is_ok_and(|found| found.is_file()));
    found
}

/// The file libvirt keeps the guest's definition in, to notice that it was changed.
pub fn definition_file(guest: &str) -> Option<cold::Definition> {
    let path = Path::new(DEFINITIONS).join(format!("{guest}.xml"));
    let found = std::fs::metadata(&path).ok()?;
    Some(cold::Definition {
        path,
        inode: found.ino(),
        size: found.size(),
        modified: found
            .mtime()
            .saturating_mul(1_000_000_000)
            .saturating_add(found.mtime_nsec()),
    })
}

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
    used.paths = counted_on(&journals, guest, is_shared)?;
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

/// Files that other guests' migrations count on: what arrives, or was here before and is to be its base, is in no definition
/// yet. Of the guest's own, which leaves: what its overlays stand on where other hosts' guests may, too.
fn counted_on(
    directory: &Path,
    guest: Uuid,
    is_shared: impl Fn(&Path) -> bool,
) -> Result<BTreeMap<PathBuf, String>, String> {
    let failed = |path: &Path, why: &dyn std::fmt::Display| {
        format!("the journal {} cannot be read: {why}", path.display())
    };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(failed(directory, &error)),
    };
    let mut paths = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(|error| failed(directory, &error))?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_suffix(".json"));
        let other = name.and_then(|name| name.parse::<Uuid>().ok());
        let Some(other) = other else { continue };
        let file = match File::open(&path) {
            Ok(file) => file,
            // It has come to its end since.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&path, &error)),
        };
        let mut text = Vec::new();
        file.take(journal::MAX_LENGTH)
            .read_to_end(&mut text)
            .map_err(|error| failed(&path, &error))?;
        let journal = Journal::parse(&text).map_err(|error| failed(&path, &error))?;
        if other == guest {
            let parts = journal.inventory.files.iter().map(|file| &file.part);
            let bases = journal.entries.iter().zip(parts).filter(|(entry, part)| {
                journal.role == Role::Source && is_base(part) && is_shared(&entry.path)
            });
            paths.extend(bases.map(|(entry, _)| (entry.path.clone(), OTHER_HOSTS.to_owned())));
            continue;
        }
        let mut found = HashSet::new();
        for entry in journal.entries {
            found.insert(plain(&entry.path));
            found.insert(entry.path);
        }
        // Its disks that do not move are here already.
        if let Some(definition) = &journal.definition {
            found.extend(named(definition).map_err(|error| failed(&path, &error))?);
        }
        let reason = format!(
            "the move of guest {} that is under way counts on it",
            journal.guest.name
        );
        for path in found {
            paths.entry(path).or_insert_with(|| reason.clone());
        }
    }
    Ok(paths)
}

/// What an overlay stands on: an image below a disk's first, or its data file.
fn is_base(part: &Part) -> bool {
    matches!(
        part,
        Part::Disk { layer: 1.., .. } | Part::Data { layer: 1.., .. }
    )
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

/// What other guests refer to, as far as they have been looked at.
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
        let paths = self.paths.into_iter();
        paths.map(|(path, reason)| Kept { path, reason }).collect()
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

/// Whether it is known that nothing is there.
pub fn is_absent(path: &Path) -> bool {
    let found = path.metadata();
    found.is_err_and(|error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory))
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
    use ferry_contract::cold::journal::{Fate, State};
    use ferry_contract::cold::{Kind, Options};
    use ferry_contract::session::{Encryption, Token};

    fn layer(path: &str, backing: Option<&str>, data: Option<&str>) -> Layer {
        Layer {
            path: path.into(),
            format: "qcow2".into(),
            backing: backing.map(PathBuf::from),
            data_file: data.map(PathBuf::from),
            encrypted: false,
        }
    }

    #[test]
    fn a_chain_becomes_items_once_each() {
        let mut found = Found::default();
        found.layers(
            "vda",
            &[
                layer("/a/./top", Some("base"), Some("../d/top.data")),
                layer("/a/base", None, None),
            ],
        );
        found.layers(
            "vdb",
            &[
                layer("/b/top", Some("/a/base"), None),
                layer("/a/base", None, None),
            ],
        );
        let paths: Vec<_> = found
            .items
            .iter()
            .map(|item| item.path.to_str().unwrap())
            .collect();
        assert_eq!(paths, ["/a/top", "/d/top.data", "/a/base", "/b/top"]);
        let relative = |part: &Part| {
            matches!(
                part,
                Part::Disk { relative: true, .. } | Part::Data { relative: true, .. }
            )
        };
        let relative: Vec<_> = found.items.iter().map(|item| relative(&item.part)).collect();
        assert_eq!(relative, [false, true, true, false]);
    }

    #[test]
    fn definition_and_headers_must_agree() {
        let disk = |layers: &[&str]| Disk {
            target: "vda".into(),
            source: Source::File("/a/top".into()),
            format: "qcow2".into(),
            media: false,
            layers: layers.iter().map(|path| Source::File(path.into())).collect(),
            ends: false,
            data: Vec::new(),
        };
        let chain = [layer("/a/top", Some("base"), None), layer("/a/base", None, None)];
        assert_eq!(agree(&disk(&[]), &chain), Ok(()));
        assert_eq!(agree(&disk(&["/a/base"]), &chain), Ok(()));
        let ends = |layers| Disk {
            ends: true,
            ..disk(layers)
        };
        assert!(agree(&ends(&[]), &chain).is_err());
        assert_eq!(agree(&ends(&[]), &chain[1..]), Ok(()));
        assert_eq!(agree(&ends(&["/a/base"]), &chain), Ok(()));
        assert!(agree(&disk(&["/a/other"]), &chain).is_err());
        assert!(agree(&disk(&["/a/base", "/a/more"]), &chain).is_err());
    }

    #[test]
    fn an_external_snapshot_has_files() {
        let xml = "<domainsnapshot><name>s</name><memory snapshot='external' file='/m'/><disks>\
                   <disk name='vda' snapshot='external' type='file'><driver type='qcow2'/><source file='/a/s'/></disk>\
                   <disk name='vdb' snapshot='no'/></disks><domain><devices><disk><source file='/x'/></disk></devices></domain>\
                   </domainsnapshot>";
        assert_eq!(name(xml).as_deref(), Ok("s"));
        assert_eq!(
            external(xml).unwrap(),
            [
                ("/m".into(), "raw".to_owned()),
                ("/a/s".into(), "qcow2".to_owned())
            ]
        );
        let internal = "<domainsnapshot><name>s</name><disks><disk name='vda' snapshot='internal'/></disks></domainsnapshot>";
        assert_eq!(external(internal), Ok(Vec::new()));
    }

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
    fn a_header_alone_makes_no_file_the_guests() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        for (parent, name) in [
            ("images", "top"),
            ("images/a", "base"),
            ("etc", "shadow"),
            ("pool", "base"),
        ] {
            std::fs::create_dir_all(at(parent)).unwrap();
            std::fs::write(at(&format!("{parent}/{name}")), name).unwrap();
        }
        std::os::unix::fs::symlink(at("etc/shadow"), at("images/link")).unwrap();
        let mut homes = Homes::default();
        homes.add(Path::new(&at("images/top")));
        let on = |homes: &Homes, base: &str, data: Option<&str>| {
            let layers = [
                layer(&at("images/top"), Some(&at(base)), data),
                layer(&at(base), None, None),
            ];
            homes.have(&layers)
        };
        assert_eq!(on(&homes, "images/a/base", Some("a/base")), Ok(()));
        for base in ["etc/shadow", "images/link", "pool/base"] {
            assert!(
                on(&homes, base, None).unwrap_err().contains("<backingStore>"),
                "{base}"
            );
        }
        assert!(on(&homes, "images/a/base", Some("../etc/shadow")).is_err());
        homes.directory(Path::new(&at("pool")));
        assert_eq!(on(&homes, "pool/base", None), Ok(()));
        homes.directory(Path::new("/"));
        homes.directory(Path::new("/dev"));
        assert!(on(&homes, "etc/shadow", None).is_err());
        // The definition names it.
        homes.add(Path::new(&at("etc/shadow")));
        assert_eq!(on(&homes, "images/link", None), Ok(()));
    }

    #[test]
    fn behind_a_symlink_the_kernel_decides() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir_all(at("far/images")).unwrap();
        std::fs::create_dir(at("far/base")).unwrap();
        std::fs::create_dir(at("base")).unwrap();
        std::os::unix::fs::symlink(at("far/images"), at("images")).unwrap();
        std::fs::write(at("far/base/raw"), "the guest's").unwrap();
        let header = at("images/../base/raw");
        // By its text it is another file: there is none, then there is one.
        assert!(certain(&header).unwrap_err().contains("symlink"));
        std::fs::write(at("base/raw"), "another's").unwrap();
        assert!(certain(&header).is_err());
        let overlay = layer(header.to_str().unwrap(), None, None);
        assert!(all_certain(&[overlay]).is_err());
        let data = at("images/top");
        let data = layer(data.to_str().unwrap(), None, Some("../base/raw"));
        assert!(all_certain(&[data]).is_err());
        // Without a symlink before it, and where nothing is.
        assert_eq!(certain(&at("far/images/../base/raw")), Ok(at("far/base/raw")));
        assert_eq!(certain(&at("no/../such")), Ok(at("such")));
        // What another guest refers to is what the kernel finds.
        let xml = format!("<disk><source file='{}'/></disk>", header.display());
        let real = |path: PathBuf| path.canonicalize().ok();
        let used: HashSet<_> = named(&xml).unwrap().into_iter().filter_map(real).collect();
        assert!(used.contains(&real(at("far/base/raw")).unwrap()));
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

    /// A journal of a guest with a base, as the engine writes it.
    fn journal(role: Role, guest: Uuid, path: &str, definition: Option<&str>) -> String {
        let guest = serde_json::json!({"name": "g", "uuid": guest});
        let part = serde_json::to_value(Part::Disk {
            target: "vda".into(),
            layer: 1,
            format: "raw".into(),
            relative: false,
        });
        let file = serde_json::json!({"path": "/source/base", "part": part.unwrap(), "kind": Kind::File, "size": 1, "allocated": 1});
        let entry = serde_json::json!({"source": "/source/base", "path": path, "temporary": null, "kind": Kind::File, "size": 1,
            "fate": Fate::Present, "digest": null, "identity": null});
        serde_json::json!({
            "version": journal::VERSION, "role": role, "state": State::Ready, "session": Uuid::from_u128(7),
            "guest": guest, "host": "two", "peer": "one", "address": "192.0.2.1", "port": 49152,
            "token": Token::new([3; 32]), "encryption": Encryption::Always, "certificate": [], "key": [],
            "peer_certificate": null, "entries": [entry], "directories": [], "manifest": null,
            "options": Options::default(), "definition": definition,
            "inventory": {"guest": guest, "autostart": false, "files": [file], "directories": [], "media": [], "metadata": []},
        })
        .to_string()
    }

    #[test]
    fn what_an_arriving_guest_counts_on_is_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let [own, other] = [1, 2].map(Uuid::from_u128);
        let write = |uuid: Uuid, text: &str| {
            std::fs::write(directory.path().join(format!("{uuid}.json")), text).unwrap();
        };
        assert_eq!(
            counted_on(Path::new("/no/such/directory"), own, |_| true),
            Ok(BTreeMap::new())
        );
        std::fs::write(directory.path().join("x.tmp"), "").unwrap();
        let definition = Some("<domain><disk><source file='/iso'/></disk></domain>");
        write(own, &journal(Role::Destination, own, "/images/own", definition));
        write(
            other,
            &journal(Role::Destination, other, "/a/../images/base", definition),
        );
        let found = counted_on(directory.path(), own, |_| true).unwrap();
        let why = "the move of guest g that is under way counts on it";
        let expected = ["/a/../images/base", "/images/base", "/iso"];
        assert_eq!(found, expected.map(|path| (path.into(), why.to_owned())).into());
        write(other, "{}");
        let why = counted_on(directory.path(), own, |_| true).unwrap_err();
        assert!(why.contains(&other.to_string()), "{why}");
    }

    #[test]
    fn a_base_that_other_hosts_see_stays_when_its_guest_leaves() {
        let directory = tempfile::tempdir().unwrap();
        let guest = Uuid::from_u128(1);
        let path = directory.path().join(format!("{guest}.json"));
        std::fs::write(path, journal(Role::Source, guest, "/nfs/base", None)).unwrap();
        let kept = |is_shared: bool| counted_on(directory.path(), guest, |_| is_shared).unwrap();
        let why = "it is on a network file system, where guests of other hosts may stand on it".to_owned();
        assert_eq!(kept(true), BTreeMap::from([("/nfs/base".into(), why)]));
        assert_eq!(kept(false), BTreeMap::new());
        assert!(!is_shared(directory.path()) && !is_shared(Path::new("/no/such/file")));
        let top = Part::Disk {
            target: "vda".into(),
            layer: 0,
            format: "qcow2".into(),
            relative: false,
        };
        assert!(!is_base(&top) && !is_base(&Part::Nvram));
    }

    #[test]
    fn only_what_is_not_there_is_absent() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!is_absent(directory.path()));
        assert!(is_absent(&directory.path().join("x")));
    }
}
