//! `virt-ferry-hook`: libvirt asks it before a guest starts (`/etc/libvirt/hooks/qemu.d/virt-ferry GUEST prepare begin -`,
//! the definition on standard input), and a failure ends the start. A guest that is on its way between two hosts must
//! not start on either: the journal says so, or the definition's own mark, and nothing else is asked.
//!
//! It is run for every start of every guest and under libvirt's lock of that guest: it opens one file, and answers.

use ferry_contract::cold::{is_remains, journal};
use std::ffi::OsStr;
use std::io::{Error, ErrorKind, Read};
use std::path::Path;
use std::process::ExitCode;
use uuid::Uuid;

/// The longest definition that is read, in bytes: libvirt's own limit.
const MAX_XML: u64 = 4 << 20;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let is = |index: usize, word: &str| {
        arguments
            .get(index)
            .is_some_and(|argument| argument == OsStr::new(word))
    };
    // Each user's own daemon runs it too, as that user, who may not read the journals: those are of the system's guests.
    let root = nix::unistd::geteuid().is_root();
    if !(is(1, "prepare") && is(2, "begin") && root) {
        return ExitCode::SUCCESS;
    }
    let mut xml = Vec::new();
    let read = std::io::stdin().take(MAX_XML).read_to_end(&mut xml);
    let verdict = match read {
        Ok(_) => ferry_host::state_directory()
            .map_err(|why| format!("it may be between two hosts, and that cannot be known: {why}"))
            .and_then(|state| verdict(&String::from_utf8_lossy(&xml), &state)),
        Err(error) => Err(format!("its definition cannot be read: {error}")),
    };
    match verdict {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            let guest = arguments
                .first()
                .map(|name| name.to_string_lossy())
                .unwrap_or_default();
            eprintln!("virt-ferry: guest {guest} must not be started on this host now: {why}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the guest of this definition may start.
fn verdict(xml: &str, state: &Path) -> Result<(), String> {
    let Some(uuid) = uuid(xml) else {
        // libvirt has parsed it, and gives every guest a UUID.
        return Err("its definition has no UUID".into());
    };
    if is_remains(xml) {
        return Err(
            "it is only what a crash has left of a migration that was given up: virsh undefine it".into(),
        );
    }
    let path = journal::path(state, uuid);
    let unreadable = |why: Error| {
        format!(
            "{} may say that it is between two hosts, and cannot be read: {why}",
            path.display()
        )
    };
    let journal = match ferry_host::journal(&path) {
        Ok(journal) => journal,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(()),
        Err(error) => return Err(unreadable(error)),
    };
    journal.fence().map_or(Ok(()), Err)
}

/// libvirt writes it as the definition's second element, before anything that others may have put in.
fn uuid(xml: &str) -> Option<Uuid> {
    let (_, rest) = xml.split_once("<uuid>")?;
    rest.split_once("</uuid>")?.0.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_contract::cold::REMAINS;

    const XML: &str = "<domain type='kvm'>\n  <name>g</name>\n  <uuid>00000000-0000-0000-0000-000000000007</uuid>\n</domain>";

    #[test]
    fn a_guest_without_a_journal_starts() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(verdict(XML, directory.path()), Ok(()));
        assert_eq!(verdict(XML, Path::new("/dev/null")), Ok(()));
        assert!(verdict("<domain/>", directory.path()).is_err());
    }

    #[test]
    fn what_a_crash_has_left_of_a_guest_does_not_start() {
        let directory = tempfile::tempdir().unwrap();
        let left = XML.replace("</name>", &format!("</name><metadata>{REMAINS}</metadata>"));
        let why = verdict(&left, directory.path()).unwrap_err();
        assert!(why.contains("virsh undefine"), "{why}");
    }

    #[test]
    fn a_journal_that_cannot_be_read_is_a_no() {
        let directory = tempfile::tempdir().unwrap();
        let path = journal::path(directory.path(), Uuid::from_u128(7));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "{}").unwrap();
        assert!(verdict(XML, directory.path())
            .unwrap_err()
            .contains("cannot be read"));
    }
}
