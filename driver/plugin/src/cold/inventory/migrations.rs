//! What migrations of this host count on, by their journals: it is in no definition yet, or not in this host's.

use super::{named, plain};
use ferry_contract::cold::journal::{self, Role};
use ferry_contract::cold::Part;
use ferry_host as host;
use std::collections::{BTreeMap, HashSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Why a base stays where other hosts' guests, which are not known here, may need it.
pub const OTHER_HOSTS: &str = "it is on a network file system, where guests of other hosts may stand on it";

/// Files that other guests' migrations count on: what arrives, or was here before and is to be its base, is in no definition
/// yet. Of the guest's own, which leaves: what its overlays stand on where other hosts' guests may, too.
pub fn counted_on(
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
        let Some(other) = journal::guest(&path) else {
            continue;
        };
        let journal = match host::journal(&path) {
            Ok(journal) => journal,
            // It has come to its end since.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(&path, &error)),
        };
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

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_contract::cold::journal::{Fate, State};
    use ferry_contract::cold::{Kind, Options};
    use ferry_contract::session::{Encryption, Token};

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
        let top = Part::Disk {
            target: "vda".into(),
            layer: 0,
            format: "qcow2".into(),
            relative: false,
        };
        assert!(!is_base(&top) && !is_base(&Part::Nvram));
    }
}
