//! Disks that are block devices: filled in place, never deleted, and never taken for another one.

mod common;

use common::cold::{conclude, disk, Engine, Scene};
use common::files::{noise, Loop};
use ferry_contract::cold::journal::Role;
use ferry_contract::cold::{Recovered, Wish};
use ferry_contract::control::Reply;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

#[test]
fn devices_are_filled_in_place() {
    let mut scene = Scene::default();
    let (one, two) = (
        scene.directory.path().join("one"),
        scene.directory.path().join("two"),
    );
    let mut content = noise(9, 40 << 20);
    content[8 << 20..30 << 20].fill(0);
    fs::write(&one, &content).unwrap();
    // What is in the way on the destination's has to go, also where the source has nothing.
    fs::write(&two, noise(10, 48 << 20)).unwrap();
    let (Some(one), Some(two)) = (Loop::over(&one), Loop::over(&two)) else {
        eprintln!("skipped: no loop devices");
        return;
    };
    scene.own(&one.0, disk(0));
    scene.elsewhere = vec![(one.0.clone(), two.0.clone())];
    let (source, destination) = scene.pulled();
    let deleted = conclude(&scene, source, destination, &[]);
    assert!(
        deleted.deleted.is_empty() && deleted.kept[0].reason.contains("volume"),
        "{deleted:?}"
    );
    let mut found = Vec::new();
    File::open(&two.0).unwrap().read_to_end(&mut found).unwrap();
    // It is longer, and the guest sees all of it.
    let behind = found.split_off(content.len());
    assert!(found == content, "the device has other content");
    assert_eq!(behind.len(), 8 << 20);
    assert!(
        behind.iter().all(|byte| *byte == 0),
        "what was there before is left"
    );
    // One that is too small, and one that is in use.
    let (source, mut offer) = scene.begin();
    offer.inventory.files[0].path = two.0.clone();
    let small = scene.directory.path().join("small");
    File::create(&small).unwrap().set_len(8 << 20).unwrap();
    let small = Loop::over(&small).unwrap();
    scene.elsewhere = vec![(two.0.clone(), small.0.clone())];
    let mut destination = Engine::start("cold-destination");
    let failure = destination.refusal(&scene.pull(&offer));
    assert!(failure.cause.contains("bytes, the source's"), "{}", failure.cause);
    source.end_aborted();
    scene.assert_clean();
}

/// Its node is another one after a reboot, and the source never deletes a device.
#[test]
fn a_guest_on_a_device_can_be_taken_back_from_a_lost_host() {
    let mut scene = Scene::default();
    let files = ["one", "two", "small"].map(|name| scene.directory.path().join(name));
    for (file, length) in files.iter().zip([8 << 20, 8 << 20, 4 << 20]) {
        File::create(file).unwrap().set_len(length).unwrap();
    }
    fs::write(&files[0], noise(12, 8 << 20)).unwrap();
    let [Some(one), Some(two), Some(small)] = files.map(|file| Loop::over(&file)) else {
        eprintln!("skipped: no loop devices");
        return;
    };
    scene.own(&one.0, disk(0));
    scene.elsewhere = vec![(one.0.clone(), two.0.clone())];
    let (source, mut destination) = scene.placed();
    destination.own();
    destination.end();
    source.crash();
    let at = |path: &Path| {
        scene.change_journal(Role::Source, |journal| {
            journal.entries[0].path = path.to_owned();
            (journal.entries[0].identity, journal.entries[0].lasting) = (Some((1, 1)), None);
        });
        scene.recovery(Role::Source, Wish::Own).hear()
    };
    match at(&small.0) {
        Some(Reply::Failed(failure)) => assert!(failure.cause.contains("not what they were"), "{failure}"),
        reply => panic!("{reply:?}"),
    }
    assert_eq!(at(&one.0), Some(Reply::ColdRecovered(Recovered::Stays)));
    scene.assert_clean();
}

/// Filling it would empty the source's disk: nothing but its content tells that it is one and the same.
#[test]
fn a_device_that_both_hosts_see_is_not_touched() {
    let mut scene = Scene::default();
    let file = scene.directory.path().join("shared");
    let content = noise(11, 40 << 20);
    fs::write(&file, &content).unwrap();
    let (Some(here), Some(there)) = (Loop::over(&file), Loop::over(&file)) else {
        eprintln!("skipped: no loop devices");
        return;
    };
    scene.own(&here.0, disk(0));
    scene.elsewhere = vec![(here.0.clone(), there.0.clone())];
    let failure = scene.refused();
    assert!(
        failure.cause.contains("may be the same storage"),
        "{}",
        failure.cause
    );
    assert!(fs::read(&file).unwrap() == content, "the device was written to");
    scene.assert_clean();
}

/// Whoever writes to a mounted one knows nothing of QEMU's locks.
#[test]
fn a_device_that_is_in_use_is_not_offered() {
    let mut scene = Scene::default();
    let content = scene.directory.path().join("content");
    fs::write(&content, noise(12, 8 << 20)).unwrap();
    let Some(device) = Loop::over(&content) else {
        eprintln!("skipped: no loop devices");
        return;
    };
    scene.own(&device.0, disk(0));
    let mounted = File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&device.0)
        .unwrap();
    let failure = Engine::start("cold-source").refusal(&scene.serve());
    assert!(failure.cause.contains("mounted"), "{failure}");
    drop(mounted);
    let (source, destination) = scene.begin();
    drop(destination);
    source.end_aborted();
}
