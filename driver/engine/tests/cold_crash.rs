//! Either cold engine dies, at each state of its journal: afterwards one host owns the guest, with all of its files.
//!
//! The invariants: never may both hosts start the guest; one of them always has all files; after recovery exactly one may
//! start it, and nothing of ours is left; the source's files go only once the destination's journal says owned.

mod common;

use common::cold::{recovered, Engine, MIB};
use common::files::sha256;
use common::guest::Guest;
use ferry_contract::cold::journal::{Role, State};
use ferry_contract::cold::{Options, Recovered, Wish};
use ferry_contract::control::{Reply, Request};
use nix::sys::signal::Signal;
use std::os::unix::fs::MetadataExt;

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
            .is_some_and(|part| common::files::allocated(&part.unwrap().path()) >= 4 * MIB)
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
    guest.assert_undone();
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

#[test]
fn the_destination_dies_while_it_asks_and_the_source_lets_go() {
    let mut guest = Guest::new();
    let (source, destination) = guest.committing();
    destination.crash();
    source.signal(Signal::SIGCONT);
    guest.scene.await_state(Role::Source, State::Committed);
    assert_eq!(guest.owners(), (false, false));
    let mut recovery = guest.scene.recovery(Role::Destination, Wish::Settle);
    guest.arrives(&mut recovery);
    guest.is_confirmed(source);
    recovery.end();
    guest.assert_moved();
}

#[test]
fn both_die_while_the_destination_asks_and_the_source_had_not_let_go() {
    let guest = Guest::new();
    let (source, destination) = guest.committing();
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
    guest.assert_undone();
}

#[test]
fn the_destination_dies_with_the_files_in_place() {
    let mut guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.crash();
    assert_eq!(guest.owners(), (false, false));
    let mut recovery = guest.scene.recovery(Role::Destination, Wish::Settle);
    guest.arrives(&mut recovery);
    recovery.end();
    guest.is_confirmed(source);
    guest.assert_moved();
}

#[test]
fn both_die_with_the_files_in_place() {
    let mut guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    source.crash();
    destination.crash();
    assert_eq!(guest.owners(), (false, false));
    let here = guest.scene.recovery(Role::Source, Wish::Settle);
    let mut there = guest.scene.recovery(Role::Destination, Wish::Settle);
    guest.arrives(&mut there);
    guest.leaves(here);
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
    guest.assert_undone();
}

#[test]
fn the_source_dies_before_it_hears_that_the_guest_is_there() {
    let mut guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    source.crash();
    guest.define();
    let here = guest.scene.recovery(Role::Source, Wish::Settle);
    destination.own();
    destination.end();
    guest.leaves(here);
    guest.assert_moved();
}

#[test]
fn the_source_dies_after_it_has_heard() {
    let mut guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    guest.define();
    destination.own();
    destination.end();
    source.crash();
    assert_eq!(guest.owners(), (false, true));
    let here = guest.scene.recovery(Role::Source, Wish::Settle);
    guest.leaves(here);
    guest.assert_moved();
}

#[test]
fn the_destination_dies_before_it_has_told() {
    let mut guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    guest.define();
    source.signal(Signal::SIGSTOP);
    destination.tell(&Request::ColdOwned);
    guest.scene.await_state(Role::Destination, State::Owned);
    destination.crash();
    assert_eq!(guest.owners(), (false, true));
    source.signal(Signal::SIGCONT);
    assert_eq!(guest.scene.recover(Role::Destination), Recovered::Arrived);
    guest.is_confirmed(source);
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
    guest.arrives(&mut there);
    there.end();
    source.hang_up();
    let here = guest.scene.recovery(Role::Source, Wish::Settle);
    guest.leaves(here);
    guest.assert_moved();
}

#[test]
fn one_engine_at_a_time_works_on_a_journal() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    let mut others = [Role::Source, Role::Destination].map(|role| guest.scene.recovery(role, Wish::Settle));
    for other in &mut others {
        let failure = other.failure();
        assert!(failure.cause.contains("still works on"), "{failure}");
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
    destination.own();
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
    let here = guest.scene.recovery(Role::Source, Wish::Settle);
    guest.leaves(here);
    guest.assert_moved();
}

#[test]
fn a_recovery_deletes_no_file_that_was_changed_since() {
    let mut guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    guest.define();
    destination.own();
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
fn what_is_left_of_an_earlier_session_does_not_touch_a_later_ones_journal() {
    let mut guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    destination.crash();
    source.end_aborted();
    let mut here = guest.scene.recovery(Role::Source, Wish::Settle);
    assert_eq!(recovered(&mut here), Recovered::Stays);
    // While that still listens for the destination.
    let (later, offer) = guest.scene.begin();
    let journal = || std::fs::read(guest.scene.journal_path(Role::Source)).unwrap();
    let written = journal();
    assert_eq!(guest.scene.recover(Role::Destination), Recovered::Undone);
    assert_eq!(guest.scene.journal(Role::Destination), None);
    here.end();
    assert!(
        journal() == written,
        "the later session's journal was written over"
    );
    let mut destination = Engine::start("cold-destination");
    destination.tell(&guest.scene.pull(&offer));
    assert_eq!(destination.hear(), Some(Reply::ColdPulled));
    guest.finish(later, destination);
    guest.assert_moved();
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
    guest.arrives(&mut there);
    there.end();
    source.crash();
    guest.scene.reboot(Role::Source);
    let here = guest.scene.recovery(Role::Source, Wish::Settle);
    guest.leaves(here);
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
