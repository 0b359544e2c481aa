//! Two cold engines over the loopback interface, with real files: what moves, what is refused, what is noticed.

mod common;

use common::cold::{conclude, disk, report, Engine, Scene, MIB};
use common::files::{
    acl, allocated, is_root, list, noise, ofd_read_lock, set_acl, sha256, writer, Mount, ACCESS, DEFAULT,
    NO_ID,
};
use ferry_contract::cold::journal::{Role, State};
use ferry_contract::cold::{Kept, Medium, Options, Part};
use ferry_contract::control::{FailureKind, Reply, Request};
use ferry_contract::session::Encryption;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn everything_moves_as_it_was() {
    let mut scene = Scene::default();
    let raw = scene.image("disk <1> & 'more'.raw", 300, 40);
    let empty = scene.source().join("empty.raw");
    File::create(&empty).unwrap().set_len(1 << 40).unwrap();
    scene.own(&empty, disk(1));
    let nothing = scene.source().join("g.log");
    File::create(&nothing).unwrap();
    scene.own(&nothing, Part::Log);
    // Written zeros are data to the file system and nothing to us; single pages of data among them stay single.
    let pages = scene.source().join("pages.raw");
    let mut content = vec![0; 8 << 20];
    content
        .chunks_mut(64 << 10)
        .for_each(|chunk| chunk[4096..8192].fill(7));
    fs::write(&pages, &content).unwrap();
    fs::set_permissions(&pages, fs::Permissions::from_mode(0o640)).unwrap();
    let attribute = Command::new("setfattr")
        .args(["-n", "user.note", "-v", "kept"])
        .arg(&pages)
        .status();
    let has_attributes = attribute.is_ok_and(|status| status.success());
    if is_root() {
        std::os::unix::fs::chown(&pages, Some(1), Some(2)).unwrap();
    }
    // An unknown group of the others that may less than they; numbers without a name are no names.
    let theirs = [
        (1, 6, NO_ID),
        (2, 4, 0),
        (2, 7, 54321),
        (4, 0, NO_ID),
        (8, 7, 0),
        (8, 0, 54321),
        (16, 6, NO_ID),
        (32, 4, NO_ID),
    ];
    set_acl(&pages, ACCESS, &list(&theirs));
    scene.own(&pages, disk(2));
    // What its directory would let others do, the source's files do not.
    let open = [
        (1, 7, NO_ID),
        (2, 7, 54321),
        (4, 7, NO_ID),
        (16, 7, NO_ID),
        (32, 7, NO_ID),
    ];
    set_acl(&scene.destination(), DEFAULT, &list(&open));
    let tpm = scene.source().join("swtpm/uuid");
    fs::create_dir_all(tpm.join("tpm2")).unwrap();
    fs::set_permissions(tpm.join("tpm2"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(tpm.join("tpm2/tpm2-00.permall"), noise(5, 6013)).unwrap();
    fs::write(tpm.join("tpm2/.lock"), "").unwrap();
    let theirs = [
        (1, 7, NO_ID),
        (2, 7, 54321),
        (4, 0, NO_ID),
        (16, 7, NO_ID),
        (32, 0, NO_ID),
    ];
    set_acl(&tpm, ACCESS, &list(&theirs));
    scene.own(&tpm, Part::Tpm);
    fs::create_dir(scene.destination().join("swtpm")).unwrap();

    let files = [&raw, &pages, &nothing, &tpm.join("tpm2/tpm2-00.permall")];
    let before: Vec<_> = files.map(|path| (sha256(path), allocated(path))).into();
    let (source, offer) = scene.begin();
    let fence = scene.journal(Role::Source).unwrap().fence();
    assert!(fence.unwrap().contains("is being moved"));
    let mut destination = Engine::start("cold-destination");
    assert_eq!(destination.ask(&scene.pull(&offer)), Reply::ColdPulled);
    assert_eq!(
        destination.statistics.remaining, 0,
        "{:?}",
        destination.statistics
    );
    assert!(destination.statistics.data >= 40 * MIB);
    // Not more than there is, however large the files look.
    assert!(
        destination.statistics.wire < 45 * MIB,
        "{:?}",
        destination.statistics
    );
    assert!(!scene.destination().join("pages.raw").exists());
    assert_eq!(scene.journal(Role::Destination).unwrap().state, State::Ready);

    // What remains never grows, once it is known: a percentage that people can believe.
    let begun = destination.remaining.iter().position(|left| *left > 0);
    let remaining = &destination.remaining[begun.unwrap_or_default()..];
    assert!(remaining.is_sorted_by(|one, two| one >= two), "{remaining:?}");

    let deleted = conclude(&scene, source, destination, &[]);
    assert_eq!(deleted.deleted.len(), 5, "{deleted:?}");
    for role in ["source", "destination"] {
        let record = scene
            .directory
            .path()
            .join(format!("logs/g-{}-{role}.json", offer.session));
        let told = report(&record);
        assert!(
            told.contains("g, shut off, moved from host1 to host2 in") && told.contains("5 of 5 files moved"),
            "{told}"
        );
        let picture = std::fs::read_to_string(record.with_extension("svg")).unwrap();
        assert!(picture.contains("5 of 5"), "{picture}");
    }
    for (path, (digest, size)) in files.iter().zip(&before) {
        let there = scene
            .destination()
            .join(path.strip_prefix(scene.source()).unwrap());
        assert_eq!(&sha256(&there), digest, "{}", there.display());
        assert!(
            allocated(&there) <= size + size / 50 + 4096,
            "{}",
            there.display()
        );
        assert!(!path.exists(), "{} is left", path.display());
    }
    assert_eq!(
        fs::metadata(scene.destination().join("empty.raw")).unwrap().len(),
        1 << 40
    );
    assert_eq!(allocated(&scene.destination().join("empty.raw")), 0);
    let found = fs::metadata(scene.destination().join("pages.raw")).unwrap();
    assert_eq!(found.mode() & 0o7777, 0o660);
    let expected = [
        (1, 6, NO_ID),
        (2, 4, 0),
        (4, 0, NO_ID),
        (8, 7, 0),
        (16, 6, NO_ID),
        (32, 0, NO_ID),
    ];
    assert_eq!(acl(&scene.destination().join("pages.raw")), Some(list(&expected)));
    assert_eq!(acl(&scene.destination().join("empty.raw")), None);
    if is_root() {
        assert_eq!((found.uid(), found.gid()), (1, 2));
    }
    if has_attributes {
        let read = Command::new("getfattr")
            .args(["-n", "user.note", "--only-values"])
            .arg(scene.destination().join("pages.raw"))
            .output()
            .unwrap();
        assert_eq!(read.stdout, b"kept");
    }
    let made = fs::metadata(scene.destination().join("swtpm/uuid/tpm2")).unwrap();
    assert_eq!(made.mode() & 0o7777, 0o700);
    // Its list stays behind, and its group may not what the mask said.
    let made = scene.destination().join("swtpm/uuid");
    assert_eq!(fs::metadata(&made).unwrap().mode() & 0o7777, 0o700);
    assert_eq!(acl(&made), None);
    // The lock was swtpm's, not the guest's.
    assert!(tpm.join("tpm2/.lock").exists() && !scene.destination().join("swtpm/uuid/tpm2/.lock").exists());
    scene.assert_clean();
}

#[test]
fn packed_limited_and_plain() {
    let mut scene = Scene {
        options: Options {
            compression: Some(1),
            bandwidth: 4 * MIB,
            ..Options::default()
        },
        encryption: Encryption::Never,
        ..Scene::default()
    };
    let path = scene.source().join("text.raw");
    let text = "virt-ferry moves guests\n".repeat(1 << 19);
    fs::write(&path, &text).unwrap();
    scene.own(&path, disk(0));
    let noisy = scene.image("noise.raw", 8, 6);
    let digests = [sha256(&path), sha256(&noisy)];
    let began = std::time::Instant::now();
    let (source, destination) = scene.pulled();
    let (sent, took) = (destination.statistics.wire, began.elapsed());
    assert!(sent > 6 * MIB && sent < 8 * MIB, "{sent}");
    // The last megabytes are booked, but nothing has to wait for them.
    assert!(took.as_secs_f64() > 1.0, "{took:?}");
    let deleted = conclude(
        &scene,
        source,
        destination,
        &[Kept {
            path: noisy.clone(),
            reason: "guest web refers to it".into(),
        }],
    );
    assert_eq!(deleted.deleted, [path]);
    assert!(
        noisy.exists() && deleted.kept[0].reason == "guest web refers to it",
        "{deleted:?}"
    );
    let there = ["text.raw", "noise.raw"].map(|name| sha256(&scene.destination().join(name)));
    assert_eq!(there, digests);
}

#[test]
fn what_another_guest_finds_by_another_mount_is_not_deleted() {
    let mut scene = Scene::default();
    let base = scene.image("base.raw", 2, 1);
    let own = scene.image("own.raw", 2, 1);
    let pool = scene.directory.path().join("pool");
    let Some(_mount) = Mount::bind(&scene.source(), &pool) else {
        println!("SKIPPED: nothing can be mounted here");
        return;
    };
    let (source, destination) = scene.pulled();
    let needed = Kept {
        path: pool.join("base.raw"),
        reason: "guest web refers to it".into(),
    };
    let deleted = conclude(&scene, source, destination, &[needed]);
    assert_eq!(deleted.deleted, [own], "{deleted:?}");
    assert!(base.exists());
}

#[test]
fn everything_in_the_way_is_told_at_once_and_nothing_stays() {
    let mut scene = Scene::default();
    scene.image("taken.raw", 2, 1);
    let homeless = scene.image("homeless.raw", 2, 1);
    let device = scene.image("device.raw", 2, 1);
    let fine = scene.image("fine.raw", 4, 2);
    scene.elsewhere = vec![
        (
            homeless,
            scene.destination().join("no/such/directory/homeless.raw"),
        ),
        (device, "/dev/no-such-volume".into()),
    ];
    fs::write(scene.destination().join("taken.raw"), "mine").unwrap();
    scene.media = vec![Medium {
        target: "sda".into(),
        path: "/iso/not-there.iso".into(),
    }];
    let (mut source, mut destination) = scene.pulling();
    let failure = destination.failure();
    assert_eq!(failure.host, "host2");
    for word in [
        "taken.raw exists",
        "no/such/directory",
        "/dev/no-such-volume",
        "not-there.iso",
    ] {
        assert!(failure.cause.contains(word), "{word}: {}", failure.cause);
    }
    assert_eq!(failure.cause.lines().count(), 4, "{}", failure.cause);
    assert_eq!(
        fs::read_to_string(scene.destination().join("taken.raw")).unwrap(),
        "mine"
    );
    // The source has heard it and has the guest again.
    let refused = source.refusal(&Request::ColdConfirm);
    assert!(refused.cause.contains("taken.raw exists"), "{}", refused.cause);
    source.end_aborted();
    destination.end();
    scene.assert_clean();
    assert!(fine.exists());
}

#[test]
fn a_running_guests_image_and_a_missing_file_are_refused() {
    let mut scene = Scene::default();
    let image = scene.image("busy.raw", 2, 1);
    scene.own(Path::new("/no/such/file"), Part::Nvram);
    let writer = writer(&image);
    let mut source = Engine::start("cold-source");
    let failure = source.refusal(&scene.serve());
    assert!(
        failure.cause.contains("busy.raw is in use") && failure.cause.contains("/no/such/file"),
        "{}",
        failure.cause
    );
    source.end();
    scene.assert_clean();
    drop(writer);
    // While it is served, nobody gets to write.
    scene.items.pop();
    let (source, _) = scene.begin();
    let late = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    assert!(ferry_engine::cold::locks::is_locked(&late, 201..202));
    source.crash();
    assert!(!ferry_engine::cold::locks::is_locked(&late, 201..202));
}

#[test]
fn a_guest_that_has_left_is_not_locked_any_more() {
    let mut scene = Scene::default();
    let image = scene.image("disk.raw", 2, 1);
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let is_locked = || ferry_engine::cold::locks::is_locked(&file, 100..300);
    let (source, mut destination) = scene.placed();
    assert!(is_locked());
    destination.own();
    assert!(!is_locked());
    destination.end();
    source.crash();
}

#[test]
fn what_both_hosts_see_is_neither_copied_nor_deleted() {
    let mut scene = Scene::default();
    let shared = scene.image("shared.raw", 8, 4);
    let own = scene.image("own.raw", 4, 2);
    // The destination sees the source's directory under another name, as over NFS.
    std::os::unix::fs::symlink(scene.source(), scene.destination().join("nfs")).unwrap();
    scene.elsewhere = vec![(shared.clone(), scene.destination().join("nfs/shared.raw"))];
    let (source, destination) = scene.pulled();
    assert!(
        destination.statistics.data < 3 * MIB,
        "{:?}",
        destination.statistics
    );
    let deleted = conclude(&scene, source, destination, &[]);
    assert_eq!(deleted.deleted, [own]);
    assert!(
        shared.exists() && deleted.kept[0].reason.contains("both hosts"),
        "{deleted:?}"
    );
    scene.assert_clean();
}

#[test]
fn bases_that_are_the_same_stay_and_others_are_refused() {
    let mut scene = Scene {
        incremental: true,
        ..Scene::default()
    };
    let layer = |layer, name: &str| Part::Disk {
        target: "vda".into(),
        layer,
        format: "qcow2".into(),
        relative: name == "base",
    };
    let top = scene.image("top.qcow2", 4, 2);
    let base = scene.image("base.qcow2", 16, 8);
    scene.items[0].part = layer(0, "top");
    scene.items[1].part = layer(1, "base");
    let there = scene.destination().join("base.qcow2");
    let missing = scene.refused().cause;
    assert!(
        missing.contains("base.qcow2 of disk vda is not on this host"),
        "{missing}"
    );
    fs::copy(&base, &there).unwrap();
    File::options()
        .write(true)
        .open(&there)
        .unwrap()
        .write_all_at(b"X", 9 * MIB)
        .unwrap();
    let other = scene.refused().cause;
    assert!(other.contains("base.qcow2 is not the same as"), "{other}");
    assert!(there.exists());
    fs::copy(&base, &there).unwrap();
    let (source, destination) = scene.pulled();
    assert!(
        destination.statistics.data < 4 * MIB,
        "{:?}",
        destination.statistics
    );
    let deleted = conclude(&scene, source, destination, &[]);
    assert_eq!(deleted.deleted, [top]);
    assert!(base.exists() && there.exists());
    scene.assert_clean();
}

#[test]
fn a_destination_without_a_copy_gets_nothing() {
    use ferry_contract::cold::journal::Fate;
    use ferry_engine::cold::hash::{manifest, Blocks};
    use ferry_engine::cold::link::{peer, Link};
    use ferry_engine::cold::messages::{Answer, Ask};
    let mut scene = Scene::default();
    let path = scene.image("disk.raw", 8, 4);
    let (source, offer) = scene.begin();
    let identity = ferry_engine::wire::Identity::generate(offer.session).unwrap();
    let mut link = Link::new(peer(&offer, Encryption::Always, identity).unwrap(), "host2");
    let mut ask = |ask: Ask| {
        let patience = std::time::Duration::from_secs(10);
        link.ask(&ask, &Default::default(), patience)
            .map_err(|error| error.to_string())
    };
    // The digest of what it has asked for, which is nothing.
    let digest = Some(Blocks::default().digest(offer.inventory.files[0].size));
    let ready = |digests: &[_]| Ask::Ready {
        digests: digests.to_vec(),
    };
    assert!(ask(ready(&[])).unwrap_err().contains("not every file"));
    let fates = vec![Fate::Moves];
    assert_eq!(ask(Ask::Fates { fates }), Ok(Answer::Noted));
    assert!(ask(ready(&[])).unwrap_err().contains("not every file"));
    assert!(ask(ready(&[digest]))
        .unwrap_err()
        .contains("has not asked for all of"));
    for digests in [&[][..], &[digest]] {
        let manifest = manifest(digests.iter().copied());
        assert!(ask(Ask::Commit { manifest }).is_err());
    }
    drop(link);
    source.end_aborted();
    scene.assert_clean();
    assert!(path.exists());
}

#[test]
fn what_another_process_uses_is_not_deleted() {
    let mut scene = Scene::default();
    let path = scene.image("base.raw", 8, 4);
    let (source, destination) = scene.pulled();
    // A guest that was started on it meanwhile, as a base.
    let reader = File::open(&path).unwrap();
    ofd_read_lock(&reader, 100);
    let deleted = conclude(&scene, source, destination, &[]);
    assert!(
        path.exists() && deleted.kept[0].reason.contains("another process"),
        "{deleted:?}"
    );
    scene.assert_clean();
}

#[test]
fn a_cancelled_move_leaves_nothing() {
    for at_source in [true, false] {
        let mut scene = Scene::limited(MIB);
        let path = scene.image("disk.raw", 64, 32);
        let (mut source, mut destination) = scene.pulling();
        scene.await_state(Role::Destination, State::Pulling);
        let cancelled = if at_source { &mut source } else { &mut destination };
        cancelled.tell(&Request::Cancel);
        let failure = destination.failure();
        // Whichever host it was cancelled on, both say so.
        assert_eq!(failure.kind, FailureKind::Cancelled, "{failure}");
        assert_eq!(failure.host, if at_source { "host1" } else { "host2" });
        let refused = source.refusal(&Request::ColdConfirm);
        assert_eq!(refused.kind, FailureKind::Cancelled, "{refused}");
        assert_eq!(source.ask(&Request::ColdAbort), Reply::ColdAborted);
        source.end();
        destination.end();
        scene.assert_not_there();
        scene.assert_clean();
        assert!(path.exists());
    }
}

/// A file system of this many MiB, unmounted at the end.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, mib: u32) -> Self {
        let options = format!("size={mib}m");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "none"])
            .arg(&at)
            .status();
        assert!(mounted.unwrap().success());
        Self(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn without_room_nothing_begins_and_room_that_goes_is_told() {
    if !is_root() {
        eprintln!("skipped: mounting a small file system needs root");
        return;
    }
    let mut scene = Scene::default();
    let path = scene.image("disk.raw", 64, 40);
    let small = Small::mount(scene.destination(), 32);
    let failure = scene.refused();
    assert!(
        failure.cause.contains("free, the guest's files there need"),
        "{}",
        failure.cause
    );
    scene.assert_not_there();
    drop(small);

    let _small = Small::mount(scene.destination(), 48);
    scene.options.bandwidth = 4 * MIB;
    let (mut source, mut destination) = scene.pulling();
    scene.await_state(Role::Destination, State::Pulling);
    let filler = scene.destination().join("filler");
    fs::write(&filler, vec![1; 30 << 20]).unwrap();
    source.tell(&Request::Limit { bandwidth: 0 });
    let failure = destination.failure();
    assert!(
        failure.cause.contains("disk.raw") && failure.cause.contains("No space left"),
        "{}",
        failure.cause
    );
    source.end_aborted();
    fs::remove_file(filler).unwrap();
    scene.assert_not_there();
    scene.assert_clean();
    assert!(path.exists());
}
