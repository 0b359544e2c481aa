//! Either cold engine dies, at each state of its journal: afterwards one host owns the guest, with all of its files.
//!
//! The invariants: never may both hosts start the guest; one of them always has all files; after recovery exactly one may
//! start it, and nothing of ours is left; the source's files go only once the destination's journal says owned.

mod common;

use common::cold::{recovered, sha256, Engine, Scene, MIB};
use ferry_contract::cold::journal::{Role, State};
use ferry_contract::cold::{Options, Recovered, Wish};
use ferry_contract::control::{Reply, Request};
use nix::sys::signal::Signal;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// A guest of one disk, and which of the hosts have it registered.
struct Guest {
    scene: Scene,
    disk: PathBuf,
    digest: String,
    at_source: bool,
    at_destination: bool,
}

impl Guest {
    fn new() -> Self {
        let mut scene = Scene::default();
        let disk = scene.image("disk.raw", 24, 16);
        let digest = sha256(&disk);
        Self {
            scene,
            disk,
            digest,
            at_source: true,
            at_destination: false,
        }
    }

    fn there(&self) -> PathBuf {
        self.scene.destination().join("disk.raw")
    }

    /// Who may start it now, as the hook decides.
    fn owners(&self) -> (bool, bool) {
        let free = |role| {
            self.scene
                .journal(role)
                .is_none_or(|journal| journal.fence().is_none())
        };
        (
            self.at_source && free(Role::Source),
            self.at_destination && free(Role::Destination),
        )
    }

    /// What holds at every instant.
    fn check(&self) {
        let owners = self.owners();
        assert_ne!(owners, (true, true), "both may start it");
        let complete = |path: &PathBuf| path.exists() && sha256(path) == self.digest;
        assert!(complete(&self.disk) || complete(&self.there()), "nobody has it");
    }

    /// libvirt registers it at the destination.
    fn define(&mut self) {
        self.check();
        assert_eq!(sha256(&self.there()), self.digest);
        self.at_destination = true;
        self.check();
    }

    /// The source's plug-in has heard that it has left.
    fn leave(&mut self, source: &mut Engine) {
        self.check();
        self.at_source = false;
        let deleted = source.ask(&Request::ColdDelete {
            keep: None,
            in_use: Vec::new(),
        });
        assert!(matches!(deleted, Reply::ColdDeleted(deleted) if deleted.deleted == [self.disk.clone()]));
        self.check();
    }

    /// It has moved, and nothing is left.
    fn assert_moved(&self) {
        assert_eq!(self.owners(), (false, true));
        assert!(!self.disk.exists());
        assert_eq!(sha256(&self.there()), self.digest);
        self.scene.assert_clean();
    }

    /// It is where it was, nothing is left, and it can be moved now.
    fn assert_stays_and_moves_again(mut self) {
        assert_eq!(self.owners(), (true, false));
        assert_eq!(sha256(&self.disk), self.digest);
        let (source, destination) = self.scene.pulled();
        self.finish(source, destination);
        self.assert_moved();
    }

    /// Finish and Confirm.
    fn finish(&mut self, mut source: Engine, mut destination: Engine) {
        self.check();
        assert_eq!(destination.ask(&Request::ColdCommit), Reply::ColdPlaced);
        self.define();
        assert_eq!(
            destination.ask(&Request::ColdOwned),
            Reply::ColdOwned { told: true }
        );
        self.check();
        assert_eq!(source.ask(&Request::ColdConfirm), Reply::ColdOwnedThere);
        self.leave(&mut source);
        source.end();
        destination.end();
    }
}

#[test]
fn the_destination_dies_while_it_pulls_and_the_next_run_takes_up_what_is_there() {
    let mut guest = Guest::new();
    guest.scene.options.bandwidth = 4 * MIB;
    let (mut source, offer) = guest.scene.begin();
    let mut destination = Engine::start("cold-destination");
    destination.tell(&guest.scene.pull(&offer));
    common::await_that("some blocks", || {
        let mut parts = std::fs::read_dir(guest.scene.destination()).unwrap();
        parts
            .next()
            .is_some_and(|part| common::cold::allocated(&part.unwrap().path()) >= 4 * MIB)
    });
    destination.crash();
    guest.check();
    // Neither host may start it as long as the source's engine serves it.
    assert_eq!(guest.owners(), (false, false));
    assert_eq!(source.ask(&Request::ColdAbort), Reply::ColdAborted);
    source.end();

    guest.scene.options = Options::default();
    let (source, destination) = guest.scene.pulled();
    // 16 MiB of noise and a byte at the end; what was there is compared and not sent.
    assert!(
        destination.statistics.data <= 13 * MIB,
        "{:?}",
        destination.statistics
    );
    guest.finish(source, destination);
    guest.assert_moved();
}

#[test]
fn what_a_crash_left_and_nobody_wants_is_removed() {
    let guest = Guest::new();
    let (mut source, destination) = guest.scene.pulled();
    destination.crash();
    assert_eq!(source.ask(&Request::ColdAbort), Reply::ColdAborted);
    source.end();
    // The source keeps a note for a destination that may ask; it fences nothing.
    assert_eq!(guest.owners(), (true, false));
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(recovered(&mut here), Recovered::Stays);
    assert_eq!(guest.scene.recover(Role::Destination), Recovered::Undone);
    here.end();
    guest.scene.assert_not_there();
    guest.scene.assert_clean();
    guest.assert_stays_and_moves_again();
}

#[test]
fn the_source_dies_while_it_serves() {
    let mut guest = Guest::new();
    guest.scene.options.bandwidth = MIB;
    let (source, offer) = guest.scene.begin();
    let mut destination = Engine::start("cold-destination");
    destination.tell(&guest.scene.pull(&offer));
    guest.scene.await_state(Role::Destination, State::Pulling);
    source.crash();
    assert_eq!(guest.owners(), (false, false));
    destination.tell(&Request::Cancel);
    assert!(matches!(destination.hear(), Some(Reply::Failed(_))));
    destination.end();
    assert_eq!(guest.scene.recover(Role::Source), Recovered::Stays);
    guest.scene.options.bandwidth = 0;
    guest.scene.assert_clean();
    guest.assert_stays_and_moves_again();
}

#[test]
fn the_destination_dies_when_everything_is_there() {
    let guest = Guest::new();
    let (mut source, destination) = guest.scene.pulled();
    guest.scene.await_state(Role::Destination, State::Ready);
    destination.crash();
    guest.check();
    assert_eq!(guest.scene.recover(Role::Destination), Recovered::Undone);
    assert_eq!(source.ask(&Request::ColdAbort), Reply::ColdAborted);
    guest.assert_stays_and_moves_again();
}

/// Both engines, the source's stopped and the destination's asking it to let go.
fn committing(guest: &Guest) -> (Engine, Engine) {
    let (source, mut destination) = guest.scene.pulled();
    source.signal(Signal::SIGSTOP);
    destination.tell(&Request::ColdCommit);
    guest.scene.await_state(Role::Destination, State::Committing);
    assert_eq!(guest.owners(), (false, false));
    (source, destination)
}

#[test]
fn the_destination_dies_while_it_asks_and_the_source_lets_go() {
    let mut guest = Guest::new();
    let (mut source, destination) = committing(&guest);
    // What it asked is in the source's socket, or on its way.
    std::thread::sleep(std::time::Duration::from_millis(300));
    destination.crash();
    source.signal(Signal::SIGCONT);
    guest.scene.await_state(Role::Source, State::Committed);
    assert_eq!(guest.owners(), (false, false));
    let mut recovery = guest.scene.recovery(Role::Destination, Wish::Settle);
    assert_eq!(recovered(&mut recovery), Recovered::Define);
    guest.define();
    assert_eq!(recovery.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    assert_eq!(source.ask(&Request::ColdConfirm), Reply::ColdOwnedThere);
    guest.leave(&mut source);
    source.end();
    recovery.end();
    guest.assert_moved();
}

#[test]
fn both_die_while_the_destination_asks_and_the_source_had_not_let_go() {
    let guest = Guest::new();
    let (source, destination) = committing(&guest);
    source.crash();
    destination.crash();
    assert_eq!(guest.scene.journal(Role::Source).unwrap().state, State::Prepared);
    let mut there = guest.scene.recovery(Role::Destination, Wish::Settle);
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(recovered(&mut here), Recovered::Stays);
    guest.check();
    assert_eq!(recovered(&mut there), Recovered::Undone);
    here.end();
    there.end();
    guest.scene.assert_not_there();
    guest.scene.assert_clean();
    guest.assert_stays_and_moves_again();
}

#[test]
fn the_destination_is_lost_and_the_operator_takes_the_guest_back() {
    let guest = Guest::new();
    let (source, destination) = committing(&guest);
    std::thread::sleep(std::time::Duration::from_millis(300));
    destination.crash();
    source.signal(Signal::SIGCONT);
    guest.scene.await_state(Role::Source, State::Committed);
    source.crash();
    assert_eq!(guest.owners(), (false, false));
    assert!(refused(&guest, Role::Source, Wish::GiveUp).contains("--lost host2 g"));
    assert_eq!(guest.owners(), (false, false));
    let (here, found) = own(&guest, Role::Source);
    assert_eq!(found, Recovered::Stays);
    here.end();
    assert_eq!(guest.owners(), (true, false));
    guest.check();
    // It was not lost after all: what it has does not keep the guest from coming again.
    assert_eq!(
        guest.scene.journal(Role::Destination).unwrap().state,
        State::Committing
    );
    guest.assert_stays_and_moves_again();
}

#[test]
fn the_destination_dies_with_the_files_in_place() {
    let mut guest = Guest::new();
    let (mut source, destination) = guest.scene.placed();
    destination.crash();
    assert_eq!(guest.owners(), (false, false));
    let mut recovery = guest.scene.recovery(Role::Destination, Wish::Settle);
    assert_eq!(recovered(&mut recovery), Recovered::Define);
    guest.define();
    assert_eq!(recovery.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    recovery.end();
    assert_eq!(source.ask(&Request::ColdConfirm), Reply::ColdOwnedThere);
    guest.leave(&mut source);
    source.end();
    guest.assert_moved();
}

#[test]
fn both_die_with_the_files_in_place() {
    let mut guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    source.crash();
    destination.crash();
    assert_eq!(guest.owners(), (false, false));
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    let mut there = guest.scene.recovery(Role::Destination, Wish::Settle);
    assert_eq!(recovered(&mut there), Recovered::Define);
    guest.define();
    assert_eq!(there.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    assert_eq!(recovered(&mut here), Recovered::Leaves);
    guest.leave(&mut here);
    here.end();
    there.end();
    guest.assert_moved();
}

#[test]
fn libvirt_cannot_register_it_and_the_source_has_it_again() {
    let guest = Guest::new();
    let (mut source, mut destination) = guest.scene.placed();
    assert_eq!(destination.ask(&Request::ColdAbort), Reply::ColdAborted);
    destination.end();
    assert!(source.refusal(&Request::ColdConfirm).cause.contains("stays here"));
    assert_eq!(source.ask(&Request::ColdAbort), Reply::ColdAborted);
    source.end();
    guest.scene.assert_not_there();
    guest.scene.assert_clean();
    guest.assert_stays_and_moves_again();
}

#[test]
fn the_source_dies_before_it_hears_that_the_guest_is_there() {
    let mut guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    source.crash();
    guest.define();
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(
        destination.ask(&Request::ColdOwned),
        Reply::ColdOwned { told: true }
    );
    destination.end();
    assert_eq!(recovered(&mut here), Recovered::Leaves);
    guest.leave(&mut here);
    here.end();
    guest.assert_moved();
}

#[test]
fn the_source_dies_after_it_has_heard() {
    let mut guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    guest.define();
    assert_eq!(
        destination.ask(&Request::ColdOwned),
        Reply::ColdOwned { told: true }
    );
    destination.end();
    source.crash();
    assert_eq!(guest.owners(), (false, true));
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(recovered(&mut here), Recovered::Leaves);
    guest.leave(&mut here);
    here.end();
    guest.assert_moved();
}

#[test]
fn the_destination_dies_before_it_has_told() {
    let mut guest = Guest::new();
    let (mut source, mut destination) = guest.scene.placed();
    guest.define();
    source.signal(Signal::SIGSTOP);
    destination.tell(&Request::ColdOwned);
    guest.scene.await_state(Role::Destination, State::Owned);
    destination.crash();
    assert_eq!(guest.owners(), (false, true));
    source.signal(Signal::SIGCONT);
    assert_eq!(guest.scene.recover(Role::Destination), Recovered::Arrived);
    assert_eq!(source.ask(&Request::ColdConfirm), Reply::ColdOwnedThere);
    guest.leave(&mut source);
    source.end();
    guest.assert_moved();
}

#[test]
fn the_plug_ins_die_and_the_engines_put_things_in_order() {
    // Before the source has let go, both undo; after it, both leave everything to recoveries.
    let guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    destination.hang_up();
    common::await_that("the source to have it again", || {
        guest.scene.journal(Role::Source).is_none()
    });
    source.hang_up();
    guest.scene.assert_not_there();
    guest.scene.assert_clean();

    let mut guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.hang_up();
    assert_eq!(
        guest.scene.journal(Role::Destination).unwrap().state,
        State::Placed
    );
    let mut there = guest.scene.recovery(Role::Destination, Wish::Settle);
    assert_eq!(recovered(&mut there), Recovered::Define);
    guest.define();
    assert_eq!(there.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    there.end();
    source.hang_up();
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(recovered(&mut here), Recovered::Leaves);
    guest.leave(&mut here);
    here.end();
    guest.assert_moved();
}

#[test]
fn one_engine_at_a_time_works_on_a_journal() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    let mut others = [Role::Source, Role::Destination].map(|role| guest.scene.recovery(role, Wish::Settle));
    for other in &mut others {
        match other.hear() {
            Some(Reply::Failed(failure)) => assert!(failure.cause.contains("still works on"), "{failure}"),
            reply => panic!("{reply:?}"),
        }
    }
    let mut guest = guest;
    guest.finish(source, destination);
    guest.assert_moved();
}

#[test]
fn what_a_later_session_has_put_in_place_is_not_undone_with_an_earlier_one() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    destination.crash();
    source.end_aborted();
    // As one does that has taken up what was left.
    let journal = guest.scene.journal(Role::Destination).unwrap();
    std::fs::rename(journal.entries[0].temporary.as_ref().unwrap(), guest.there()).unwrap();
    let mut recovery = guest.scene.recovery(Role::Destination, Wish::GiveUp);
    assert_eq!(recovered(&mut recovery), Recovered::Undone);
    assert_eq!(sha256(&guest.there()), guest.digest);
}

#[test]
fn the_source_dies_while_it_deletes() {
    let mut guest = Guest::new();
    let (mut source, mut destination) = guest.scene.placed();
    guest.define();
    assert_eq!(
        destination.ask(&Request::ColdOwned),
        Reply::ColdOwned { told: true }
    );
    destination.end();
    guest.at_source = false;
    // A journal that cannot be removed is there after the deletion, as after a crash between the two.
    let path = guest.scene.journal_path(Role::Source);
    let journal = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    guest.leave(&mut source);
    source.end();
    assert!(!guest.disk.exists());
    std::fs::remove_dir(&path).unwrap();
    std::fs::write(&path, journal).unwrap();
    assert_eq!(guest.owners(), (false, true));
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(recovered(&mut here), Recovered::Leaves);
    guest.leave(&mut here);
    here.end();
    guest.assert_moved();
}

#[test]
fn a_recovery_deletes_no_file_that_was_changed_since() {
    let mut guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    guest.define();
    assert_eq!(
        destination.ask(&Request::ColdOwned),
        Reply::ColdOwned { told: true }
    );
    destination.end();
    source.crash();
    std::fs::OpenOptions::new()
        .append(true)
        .open(&guest.disk)
        .and_then(|mut file| std::io::Write::write_all(&mut file, b"another life"))
        .unwrap();
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(recovered(&mut here), Recovered::Leaves);
    let deleted = here.ask(&Request::ColdDelete {
        keep: None,
        in_use: Vec::new(),
    });
    match deleted {
        Reply::ColdDeleted(deleted) => {
            assert!(deleted.kept[0].reason.contains("changed after"), "{deleted:?}")
        }
        other => panic!("{other:?}"),
    }
    here.end();
    assert!(guest.disk.exists());
    guest.scene.assert_clean();
}

/// Why a recovery is refused.
fn refused(guest: &Guest, role: Role, wish: Wish) -> String {
    match guest.scene.recovery(role, wish).hear() {
        Some(Reply::Failed(failure)) => failure.cause,
        reply => panic!("{reply:?}"),
    }
}

/// The operator says so: nobody is asked.
fn own(guest: &Guest, role: Role) -> (Engine, Recovered) {
    let mut engine = guest.scene.recovery(role, Wish::Own);
    let found = recovered(&mut engine);
    (engine, found)
}

#[test]
fn a_source_whose_other_host_is_lost_keeps_the_guest() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.crash();
    source.crash();
    assert_eq!(guest.owners(), (false, false));
    let (engine, found) = own(&guest, Role::Source);
    assert_eq!(found, Recovered::Stays);
    engine.end();
    assert_eq!(guest.owners(), (true, false));
    assert!(guest.scene.journal(Role::Source).is_none());

    // Also where it has heard that the guest is the other one's, as long as its own files are what they were.
    std::fs::remove_file(guest.there()).unwrap();
    std::fs::remove_file(guest.scene.journal_path(Role::Destination)).unwrap();
    for changed in [false, true] {
        let (source, mut destination) = guest.scene.placed();
        assert_eq!(
            destination.ask(&Request::ColdOwned),
            Reply::ColdOwned { told: true }
        );
        destination.end();
        source.crash();
        if changed {
            let disk = std::fs::File::options().write(true).open(&guest.disk).unwrap();
            disk.set_len(1).unwrap();
            let mut engine = guest.scene.recovery(Role::Source, Wish::Own);
            match engine.hear() {
                Some(Reply::Failed(failure)) => {
                    assert!(failure.cause.contains("not what they were"), "{failure}")
                }
                reply => panic!("{reply:?}"),
            }
            assert!(guest.disk.exists());
            return;
        }
        let (engine, found) = own(&guest, Role::Source);
        assert_eq!(found, Recovered::Stays);
        engine.end();
        assert_eq!(guest.owners(), (true, false));
        assert_eq!(sha256(&guest.disk), guest.digest);
        std::fs::remove_file(guest.there()).unwrap();
    }
}

#[test]
fn a_destination_whose_other_host_is_lost_takes_what_is_whole() {
    for ready in [true, false] {
        let mut guest = Guest::new();
        let (source, destination) = match ready {
            true => guest.scene.pulled(),
            false => guest.scene.placed(),
        };
        destination.crash();
        source.crash();
        let (mut engine, found) = own(&guest, Role::Destination);
        assert_eq!(found, Recovered::Define);
        assert_eq!(sha256(&guest.there()), guest.digest);
        // As if the host had burnt down.
        guest.at_source = false;
        guest.define();
        assert_eq!(engine.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
        engine.end();
        assert_eq!(guest.owners(), (false, true));
        assert!(guest.scene.journal(Role::Destination).is_none());
    }

    // It is here already, and nobody is left to be told.
    let mut guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    guest.define();
    source.crash();
    destination.tell(&Request::ColdOwned);
    guest.scene.await_state(Role::Destination, State::Owned);
    destination.crash();
    let (engine, found) = own(&guest, Role::Destination);
    assert_eq!(found, Recovered::Arrived);
    engine.end();
    assert!(guest.scene.journal(Role::Destination).is_none());
}

#[test]
fn what_has_come_in_part_is_nobodys() {
    let mut guest = Guest::new();
    guest.scene.options.bandwidth = 4 * MIB;
    let (source, offer) = guest.scene.begin();
    let mut destination = Engine::start("cold-destination");
    destination.tell(&guest.scene.pull(&offer));
    guest.scene.await_state(Role::Destination, State::Pulling);
    destination.crash();
    source.crash();
    let mut engine = guest.scene.recovery(Role::Destination, Wish::Own);
    match engine.hear() {
        Some(Reply::Failed(failure)) => assert!(failure.cause.contains("not all of"), "{failure}"),
        reply => panic!("{reply:?}"),
    }
}

/// What has come to a destination, as a whole: under its own name or not yet.
fn has_all(guest: &Guest) -> bool {
    let journal = guest.scene.journal(Role::Destination).unwrap();
    let entry = &journal.entries[0];
    let came = [Some(&entry.path), entry.temporary.as_ref()];
    let came = came.into_iter().flatten().find(|path| path.exists());
    journal.fence().is_some() && came.is_some_and(|path| sha256(path) == guest.digest)
}

#[test]
fn a_destination_whose_source_is_silent_removes_nothing_until_it_has_answered() {
    // libvirt gives it up before and after the commitment, and once the daemon just ends.
    let [ready, placed, left] = [(); 3].map(|()| Guest::new());
    let mut waiting = vec![];
    for (guest, (source, mut destination)) in [
        (&ready, ready.scene.pulled()),
        (&placed, placed.scene.placed()),
        (&left, left.scene.pulled()),
    ] {
        source.crash();
        match std::ptr::eq(guest, &left) {
            true => destination.let_go(),
            false => destination.tell(&Request::ColdAbort),
        }
        waiting.push((guest, destination));
    }
    for (guest, mut destination) in waiting {
        if !std::ptr::eq(guest, &left) {
            match destination.hear() {
                Some(Reply::Failed(failure)) => {
                    assert!(failure.cause.contains("does not say whose"), "{failure}");
                }
                reply => panic!("{reply:?}"),
            }
            destination.let_go();
        }
        destination.end();
        assert!(has_all(guest));
        assert_eq!(guest.owners(), (false, false));
    }

    // The source is back, and was never lost: it has the guest, whether it had let go or not.
    for guest in [ready, placed] {
        let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
        let mut there = guest.scene.recovery(Role::Destination, Wish::Settle);
        assert_eq!(recovered(&mut here), Recovered::Stays);
        guest.check();
        assert_eq!(recovered(&mut there), Recovered::Undone);
        here.end();
        there.end();
        guest.scene.assert_not_there();
        guest.scene.assert_clean();
        guest.assert_stays_and_moves_again();
    }

    // It is lost: this is all there is of the guest.
    let mut guest = left;
    let (mut engine, found) = own(&guest, Role::Destination);
    assert_eq!(found, Recovered::Define);
    guest.at_source = false;
    guest.define();
    assert_eq!(engine.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    engine.end();
    assert_eq!(guest.owners(), (false, true));
}

#[test]
fn a_recovery_whose_source_is_silent_leaves_all_that_has_come() {
    let [ready, committing_, placed] = [(); 3].map(|()| Guest::new());
    let engines = [
        (&ready, ready.scene.pulled()),
        (&committing_, committing(&committing_)),
        (&placed, placed.scene.placed()),
    ];
    let mut recoveries = vec![];
    for (guest, (source, destination)) in engines {
        source.crash();
        destination.crash();
        recoveries.push((guest, guest.scene.recovery(Role::Destination, Wish::Settle)));
    }
    for (guest, mut recovery) in recoveries {
        match recovered(&mut recovery) {
            Recovered::Unknown { cause } => assert!(cause.contains("does not say whose"), "{cause}"),
            other => panic!("{other:?}"),
        }
        recovery.end();
        assert!(has_all(guest));
        assert_eq!(guest.owners(), (false, false));
    }
    // The operator decides, either way.
    for (mut guest, wish) in [
        (ready, Wish::GiveUp),
        (committing_, Wish::Own),
        (placed, Wish::Own),
    ] {
        if wish == Wish::GiveUp {
            let mut recovery = guest.scene.recovery(Role::Destination, wish);
            assert_eq!(recovered(&mut recovery), Recovered::Undone);
            recovery.end();
            guest.scene.assert_not_there();
            // Kept to be told; there is nobody.
            let journal = guest.scene.journal(Role::Destination).unwrap();
            assert_eq!((journal.state, journal.fence()), (State::Aborted, None));
            let (engine, found) = own(&guest, Role::Destination);
            assert_eq!(found, Recovered::Undone);
            engine.end();
            assert_eq!(guest.scene.journal(Role::Destination), None);
            continue;
        }
        let (mut engine, found) = own(&guest, Role::Destination);
        assert_eq!(found, Recovered::Define);
        guest.at_source = false;
        guest.define();
        assert_eq!(engine.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
        engine.end();
        assert_eq!(guest.owners(), (false, true));
    }
}

#[test]
fn a_source_that_answers_is_not_lost() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    destination.crash();
    let why = refused(&guest, Role::Destination, Wish::Own);
    assert!(why.contains("host1 is not lost, it answers"), "{why}");
    assert!(has_all(&guest));
    assert_eq!(guest.scene.recover(Role::Destination), Recovered::Undone);
    source.end_aborted();
    guest.assert_stays_and_moves_again();
}

#[test]
fn a_source_that_has_let_go_does_not_give_up_alone() {
    let mut guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.crash();
    source.let_go();
    // While its engine still waits for the destination, which goes on.
    let why = refused(&guest, Role::Source, Wish::GiveUp);
    assert!(why.contains("only host host2 knows"), "{why}");
    source.crash();
    assert_eq!(refused(&guest, Role::Source, Wish::GiveUp), why);
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    let mut there = guest.scene.recovery(Role::Destination, Wish::Settle);
    assert_eq!(recovered(&mut there), Recovered::Define);
    guest.define();
    assert_eq!(there.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    assert_eq!(recovered(&mut here), Recovered::Leaves);
    guest.leave(&mut here);
    here.end();
    there.end();
    guest.assert_moved();
}

#[test]
fn an_engine_that_waits_for_a_lost_host_is_ended_by_the_operators_word() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.crash();
    source.let_go();
    let (engine, found) = own(&guest, Role::Source);
    assert_eq!(found, Recovered::Stays);
    engine.end();
    assert_eq!(source.killed_by(), Some(Signal::SIGTERM));
    assert_eq!(guest.owners(), (true, false));
    // The destination comes back all the same, and has the files in place: it asks, and registers nothing before it has heard.
    match guest.scene.recover(Role::Destination) {
        Recovered::Unknown { cause } => assert!(cause.contains("does not say whose"), "{cause}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(guest.owners(), (true, false));
    guest.check();
}

#[test]
fn a_destination_with_the_files_in_place_hears_that_the_source_has_the_guest_again() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.crash();
    source.crash();
    // As a release before this one wrote it, for an operator who gave the migration up there.
    let path = guest.scene.journal_path(Role::Source);
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace(r#""state":"committed""#, r#""state":"aborted""#);
    std::fs::write(&path, text).unwrap();
    assert_eq!(guest.owners(), (true, false));
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(recovered(&mut here), Recovered::Stays);
    match guest.scene.recover(Role::Destination) {
        Recovered::Unknown { cause } => assert!(cause.contains("host1 has the guest again"), "{cause}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(guest.owners(), (true, false));
    let mut there = guest.scene.recovery(Role::Destination, Wish::GiveUp);
    assert_eq!(recovered(&mut there), Recovered::Undone);
    here.end();
    there.end();
    guest.scene.assert_not_there();
    guest.assert_stays_and_moves_again();
}

#[test]
fn a_copy_that_waits_gives_way_to_its_own_source_only() {
    let mut guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    destination.crash();
    source.end_aborted();
    let path = guest.scene.journal_path(Role::Destination);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace(r#""peer":"host1""#, r#""peer":"host3""#)).unwrap();
    let (source, offer) = guest.scene.begin();
    let mut destination = Engine::start("cold-destination");
    let why = destination.refusal(&guest.scene.pull(&offer)).cause;
    assert!(why.contains("has come here from host3 before"), "{why}");
    assert!(has_all(&guest));
    source.end_aborted();

    // Its own one has been interrupted while the files got their names.
    let mut journal = guest.scene.journal(Role::Destination).unwrap();
    (journal.peer, journal.state) = ("host1".into(), State::Committing);
    std::fs::write(&path, serde_json::to_vec(&journal).unwrap()).unwrap();
    std::fs::rename(journal.entries[0].temporary.as_ref().unwrap(), guest.there()).unwrap();
    // What has made way is not said to be here any more, also where the new session gets no further.
    let taken = guest.scene.directory.path().join("taken");
    std::fs::write(&taken, "").unwrap();
    guest.scene.elsewhere = vec![(guest.disk.clone(), taken)];
    guest.scene.refused();
    assert!(!guest.there().exists());
    let state = guest.scene.journal(Role::Destination).unwrap().state;
    assert_eq!(state, State::Pulling);
    guest.scene.elsewhere.clear();
    guest.assert_stays_and_moves_again();
}

#[test]
fn a_second_recovery_does_not_mind_that_the_first_still_listens() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    destination.crash();
    source.end_aborted();
    let attempts = [(); 2].map(|()| {
        let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
        assert_eq!(recovered(&mut here), Recovered::Stays);
        here
    });
    assert_eq!(guest.scene.recover(Role::Destination), Recovered::Undone);
    attempts.into_iter().for_each(Engine::end);
    guest.scene.assert_clean();
}

#[test]
fn after_a_reboot_both_hosts_know_their_files() {
    let mut guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.crash();
    // Before it could write down that they are in place, one of them perhaps with both of its names.
    guest.scene.reboot(Role::Destination);
    let temporary = guest.scene.journal(Role::Destination).unwrap().entries[0]
        .temporary
        .clone();
    std::fs::hard_link(guest.there(), temporary.unwrap()).unwrap();
    guest
        .scene
        .change_journal(Role::Destination, |journal| journal.state = State::Committing);
    let mut there = guest.scene.recovery(Role::Destination, Wish::Settle);
    assert_eq!(recovered(&mut there), Recovered::Define);
    guest.define();
    assert_eq!(there.ask(&Request::ColdOwned), Reply::ColdOwned { told: true });
    there.end();
    source.crash();
    guest.scene.reboot(Role::Source);
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(recovered(&mut here), Recovered::Leaves);
    guest.leave(&mut here);
    here.end();
    guest.assert_moved();
}

#[test]
fn after_a_reboot_a_destination_that_gives_up_removes_its_files_and_no_others() {
    for anothers in [false, true] {
        let guest = Guest::new();
        let (source, destination) = guest.scene.placed();
        destination.crash();
        let lasting = guest.scene.reboot(Role::Destination);
        let anothers = anothers && lasting;
        if anothers {
            let copy = guest.scene.destination().join("copy");
            std::fs::copy(guest.there(), &copy).unwrap();
            std::fs::rename(&copy, guest.there()).unwrap();
            // Of the numbers that the one that was written had.
            let found = std::fs::metadata(guest.there()).unwrap();
            guest.scene.change_journal(Role::Destination, |journal| {
                journal.entries[0].identity = Some((found.dev(), found.ino()));
            });
        }
        let mut there = guest.scene.recovery(Role::Destination, Wish::GiveUp);
        assert_eq!(recovered(&mut there), Recovered::Undone);
        there.end();
        source.end_aborted();
        if anothers {
            assert_eq!(sha256(&guest.there()), guest.digest);
            std::fs::remove_file(guest.there()).unwrap();
        }
        guest.assert_stays_and_moves_again();
    }
}
