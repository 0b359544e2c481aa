//! Disks go to another place of the same host, and the engine dies at each state of its journal: afterwards the guest has
//! the files that its definition names, whole, and no others are left.

mod common;

use common::cold::{recovered, report, Engine, Scene, MIB};
use common::files::{acl, allocated, list, set_acl, sha256, writer, ACCESS, NO_ID};
use ferry_contract::cold::journal::{Journal, Role, State};
use ferry_contract::cold::storage::Rename;
use ferry_contract::cold::{Kept, Recovered, Wish};
use ferry_contract::control::{FailureKind, Reply, Request};
use ferry_engine::cold::header;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Two disks, and what is in them.
struct Disks {
    scene: Scene,
    old: Vec<PathBuf>,
    digests: Vec<String>,
}

const DELETE: Request = Request::ColdDelete {
    keep: None,
    in_use: Vec::new(),
};

impl Disks {
    fn new(data: u64) -> Self {
        let mut scene = Scene::default();
        let old = vec![
            scene.image("one.raw", 2 * data, data),
            scene.image("two.raw", 9, 1),
        ];
        let digests = old.iter().map(|path| sha256(path)).collect();
        Self { scene, old, digests }
    }

    fn new_places(&self) -> Vec<PathBuf> {
        let names = self.old.iter().map(|path| path.file_name().unwrap());
        names.map(|name| self.scene.destination().join(name)).collect()
    }

    /// Up to where libvirt is to define the guest anew.
    fn placed(&self) -> Engine {
        let mut engine = Engine::start("cold-move");
        assert_eq!(engine.ask(&self.scene.relocate()), Reply::ColdPlaced);
        engine
    }

    fn journal(&self) -> Option<Journal> {
        self.scene.journal(Role::Within)
    }

    fn recover(&self) -> Recovered {
        self.scene.recover(Role::Within)
    }

    fn are_whole(&self, paths: &[PathBuf]) {
        let found: Vec<_> = paths.iter().map(|path| sha256(path)).collect();
        assert_eq!(found, self.digests);
    }

    fn are_old(&self) {
        self.are_whole(&self.old);
        self.scene.assert_not_there();
        self.scene.assert_clean();
    }

    fn are_new(&self) {
        self.are_whole(&self.new_places());
        assert!(!self.old.iter().any(|path| path.exists()));
        self.scene.assert_clean();
    }
}

#[test]
fn files_move_and_stay_sparse() {
    let disks = Disks::new(8);
    let sizes: Vec<_> = disks.old.iter().map(|path| allocated(path)).collect();
    // Here a number is who it was.
    let theirs = [
        (1, 6, NO_ID),
        (2, 6, 54321),
        (4, 0, NO_ID),
        (16, 6, NO_ID),
        (32, 0, NO_ID),
    ];
    set_acl(&disks.old[1], ACCESS, &list(&theirs));
    let mut engine = disks.placed();
    assert_eq!(engine.statistics.remaining, 0);
    disks.are_whole(&disks.old);
    disks.are_whole(&disks.new_places());
    let journal = disks.journal().unwrap();
    assert!(journal.state == State::Placed && journal.fence().is_some());
    // Nothing is deleted before the definition names the copies.
    assert_eq!(engine.refusal(&DELETE).kind, FailureKind::Failed);
    assert_eq!(engine.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    assert_eq!(disks.journal().unwrap().fence(), None);
    match engine.ask(&DELETE) {
        Reply::ColdDeleted(deleted) => {
            assert_eq!((deleted.deleted, deleted.kept), (disks.old.clone(), Vec::new()))
        }
        other => panic!("{other:?}"),
    }
    engine.end();
    disks.are_new();
    for (path, size) in disks.new_places().iter().zip(sizes) {
        assert!(allocated(path) <= size, "{} of {size}", allocated(path));
    }
    let lists = disks
        .new_places()
        .iter()
        .map(|path| acl(path))
        .collect::<Vec<_>>();
    assert_eq!(lists, [None, Some(list(&theirs))]);
}

#[test]
fn files_that_are_needed_or_to_stay_are_not_deleted() {
    for keep in [Some("it was to stay".to_owned()), None] {
        let disks = Disks::new(2);
        let mut engine = disks.placed();
        engine.ask(&Request::ColdOwned);
        let reasons = match &keep {
            Some(why) => [why.clone(), why.clone()],
            None => ["guest web refers to it", "guests of other hosts may"].map(str::to_owned),
        };
        let stays = disks.old.iter().zip(reasons);
        let stays: Vec<_> = stays
            .map(|(path, reason)| Kept {
                path: path.clone(),
                reason,
            })
            .collect();
        let in_use = match keep {
            Some(_) => Vec::new(),
            None => stays.clone(),
        };
        let session = disks.journal().unwrap().session;
        match engine.ask(&Request::ColdDelete { keep, in_use }) {
            Reply::ColdDeleted(deleted) => {
                assert_eq!((deleted.deleted, &deleted.kept), (Vec::new(), &stays))
            }
            other => panic!("{other:?}"),
        }
        engine.end();
        let record = disks.scene.directory.path();
        let record = record.join(format!("logs/g-{session}-source.json"));
        let told = report(&record);
        for Kept { reason, .. } in &stays {
            assert!(told.contains(&format!(", not deleted: {reason}")), "{told}");
        }
        disks.are_whole(&disks.old);
        disks.are_whole(&disks.new_places());
        assert_eq!(disks.journal(), None);
    }
}

#[test]
fn what_is_in_the_way_is_told_at_once_and_a_dry_run_does_nothing() {
    let disks = Disks::new(2);
    let Request::ColdMove(mut order) = disks.scene.relocate() else {
        panic!("no order")
    };
    order.dry_run = true;
    let mut engine = Engine::start("cold-move");
    assert_eq!(engine.ask(&Request::ColdMove(order.clone())), Reply::ColdPlanned);
    engine.end();
    disks.are_old();
    fs::write(&order.places[0], "somebody's").unwrap();
    order.places[1] = "/no/such/directory/two.raw".into();
    order.dry_run = false;
    let writer = writer(&disks.old[1]);
    let mut engine = Engine::start("cold-move");
    let said = engine.refusal(&Request::ColdMove(order.clone())).cause;
    for word in ["exists", "no directory", "open for writing"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    engine.end();
    drop(writer);
    assert_eq!(fs::read_to_string(&order.places[0]).unwrap(), "somebody's");
    assert_eq!(disks.journal(), None);
    disks.are_whole(&disks.old);
}

/// Enough to be caught while it is copied.
const MUCH: u64 = 192;

#[test]
fn it_ends_while_it_copies() {
    let disks = Disks::new(MUCH);
    let begun = || {
        let mut engine = Engine::start("cold-move");
        engine.tell(&disks.scene.relocate());
        disks.scene.await_state(Role::Within, State::Pulling);
        engine
    };
    let mut engine = begun();
    engine.tell(&Request::Cancel);
    match engine.hear() {
        Some(Reply::Failed(failure)) => assert_eq!(failure.kind, FailureKind::Cancelled),
        other => panic!("{other:?}"),
    }
    engine.end();
    disks.are_old();
    // Its plug-in's daemon dies.
    begun().hang_up();
    disks.are_old();
    // It dies itself.
    begun().crash();
    assert!(disks.journal().unwrap().fence().is_some());
    let mut second = Engine::start("cold-move");
    assert!(second
        .refusal(&disks.scene.relocate())
        .cause
        .contains("virt-ferry recover"));
    second.end();
    assert_eq!(disks.recover(), Recovered::Undone);
    disks.are_old();
}

#[test]
fn it_dies_before_the_definition_is_changed() {
    let disks = Disks::new(4);
    disks.placed().crash();
    disks.scene.reboot(Role::Within);
    let mut recovery = disks.scene.recovery(Role::Within, Wish::Settle);
    assert_eq!(recovered(&mut recovery), Recovered::Define);
    // The definition still names the old files.
    assert_eq!(recovery.ask(&Request::ColdAbort), Reply::ColdAborted);
    recovery.end();
    disks.are_old();
    // As does the plug-in that cannot define the guest.
    let mut engine = disks.placed();
    assert_eq!(engine.ask(&Request::ColdAbort), Reply::ColdAborted);
    engine.end();
    disks.are_old();
}

#[test]
fn it_dies_after_the_definition_was_changed() {
    let disks = Disks::new(4);
    // A daemon that dies leaves it to the recovery.
    disks.placed().hang_up();
    assert_eq!(disks.journal().unwrap().state, State::Placed);
    disks.scene.reboot(Role::Within);
    let mut recovery = disks.scene.recovery(Role::Within, Wish::Settle);
    assert_eq!(recovered(&mut recovery), Recovered::Define);
    assert_eq!(recovery.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    recovery.crash();
    let mut recovery = disks.scene.recovery(Role::Within, Wish::Settle);
    assert_eq!(recovered(&mut recovery), Recovered::Leaves);
    // It cannot be given back any more.
    assert_eq!(recovery.refusal(&Request::ColdAbort).kind, FailureKind::Failed);
    // An old file that was changed meanwhile is somebody's.
    fs::write(&disks.old[1], "changed").unwrap();
    match recovery.ask(&DELETE) {
        Reply::ColdDeleted(deleted) => assert_eq!((deleted.deleted.len(), deleted.kept.len()), (1, 1)),
        other => panic!("{other:?}"),
    }
    recovery.end();
    assert_eq!(disks.journal(), None);
    disks.are_whole(&disks.new_places());
    assert_eq!(fs::read_to_string(&disks.old[1]).unwrap(), "changed");
    assert_eq!(allocated(&disks.new_places()[1]) / MIB, 1);
}

#[test]
fn what_another_guest_has_come_to_use_stays_where_it_was_put() {
    let disks = Disks::new(2);
    let new = disks.new_places();
    let base = [Kept {
        path: new[0].clone(),
        reason: "guest g2 needs it".into(),
    }];
    for state in [State::Committing, State::Placed] {
        disks.placed().crash();
        disks
            .scene
            .change_journal(Role::Within, |journal| journal.state = state);
        let mut recovery = disks.scene.recovery_beside(Role::Within, Wish::Settle, &base);
        match recovered(&mut recovery) {
            Recovered::Undone => assert_eq!(state, State::Committing),
            // The definition still names the old files.
            Recovered::Define => assert_eq!(recovery.ask(&Request::ColdAbort), Reply::ColdAborted),
            other => panic!("{other:?}"),
        }
        recovery.end();
        assert!(!new[1].exists());
        assert_eq!(sha256(&new[0]), disks.digests[0], "{state:?}");
        fs::remove_file(&new[0]).unwrap();
        disks.are_old();
    }
}

/// The header of an image that also has a data file beside it, which QEMU looks for where it runs.
#[test]
fn a_header_names_its_base_anew() {
    let directory = tempfile::tempdir().unwrap();
    let tool = |arguments: &[&str]| {
        let output = Command::new("qemu-img")
            .args(arguments)
            .current_dir(&directory)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    tool(&["create", "-q", "-f", "raw", "base.raw", "1M"]);
    let (options, base) = ("data_file=top.data", directory.path().join("base.raw"));
    let base = base.to_str().unwrap();
    tool(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        "-b",
        base,
        "-F",
        "raw",
        "top.qcow2",
    ]);
    let anew = |backing: &str| Rename {
        image: directory.path().join("top.qcow2"),
        format: "qcow2".into(),
        backing: backing.into(),
        backing_format: "raw".into(),
    };
    // Longer than the old one, too, and not there yet.
    let long = format!("/not/there/{}.raw", "x".repeat(200));
    for backing in ["base.raw", &long, base] {
        header::rename(&anew(backing)).unwrap();
        let said = tool(&["info", "--output=json", "top.qcow2"]);
        assert!(
            said.contains(&format!("\"backing-filename\": \"{backing}\"")),
            "{said}"
        );
        assert!(said.contains("\"data-file\": \"top.data\""), "{said}");
    }
    let refused = header::rename(&Rename {
        format: "raw".into(),
        ..anew("base.raw")
    });
    assert!(refused
        .unwrap_err()
        .to_string()
        .contains("top.qcow2 cannot be made"));
}
