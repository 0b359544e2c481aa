//! One host is lost, or only silent: what is all there is of a guest is removed by nobody but whoever knows that it is not,
//! and the operator's word decides. The invariants are those of cold_crash.rs.

mod common;

use common::cold::{recovered, Engine, MIB};
use common::files::{ofd_read_lock, sha256, Mount};
use common::guest::Guest;
use ferry_contract::cold::journal::{Role, State};
use ferry_contract::cold::{Digest, Kept, Recovered, Wish};
use ferry_contract::control::{Reply, Request};
use nix::sys::signal::Signal;

#[test]
fn the_destination_is_lost_and_the_operator_takes_the_guest_back() {
    let guest = Guest::new();
    let (source, destination) = guest.committing();
    destination.crash();
    source.signal(Signal::SIGCONT);
    guest.scene.await_state(Role::Source, State::Committed);
    source.crash();
    assert_eq!(guest.owners(), (false, false));
    assert!(guest
        .refused(Role::Source, Wish::GiveUp)
        .contains("--lost host2 g"));
    assert_eq!(guest.owners(), (false, false));
    let here = guest.owned(Role::Source, Recovered::Stays);
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
fn a_source_whose_other_host_is_lost_keeps_the_guest() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.crash();
    source.crash();
    assert_eq!(guest.owners(), (false, false));
    let engine = guest.owned(Role::Source, Recovered::Stays);
    engine.end();
    assert_eq!(guest.owners(), (true, false));
    assert!(guest.scene.journal(Role::Source).is_none());

    // Also where it has heard that the guest is the other one's, as long as its own files are what they were.
    std::fs::remove_file(guest.there()).unwrap();
    std::fs::remove_file(guest.scene.journal_path(Role::Destination)).unwrap();
    for changed in [false, true] {
        let (source, mut destination) = guest.scene.placed();
        destination.own();
        destination.end();
        source.crash();
        if changed {
            let disk = std::fs::File::options().write(true).open(&guest.disk).unwrap();
            disk.set_len(1).unwrap();
            let mut engine = guest.scene.recovery(Role::Source, Wish::Own);
            let failure = engine.failure();
            assert!(failure.cause.contains("not what they were"), "{failure}");
            assert!(guest.disk.exists());
            return;
        }
        let engine = guest.owned(Role::Source, Recovered::Stays);
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
        guest.is_taken();
    }

    // It is here already, and nobody is left to be told.
    let mut guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    guest.define();
    source.crash();
    destination.tell(&Request::ColdOwned);
    guest.scene.await_state(Role::Destination, State::Owned);
    destination.crash();
    // Before it moves on, that must be said.
    let Request::ColdServe(mut onward) = guest.scene.serve() else {
        unreachable!("it serves")
    };
    onward.settings = guest.scene.settings(Role::Destination);
    let why = Engine::start("cold-source")
        .refusal(&Request::ColdServe(onward))
        .cause;
    assert!(
        why.contains("\"virt-ferry recover --lost host1 g\" here"),
        "{why}"
    );
    let engine = guest.owned(Role::Destination, Recovered::Arrived);
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
    let failure = engine.failure();
    assert!(failure.cause.contains("not all of"), "{failure}");
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
            let failure = destination.failure();
            assert!(failure.cause.contains("does not say whose"), "{failure}");
            destination.let_go();
        }
        destination.end();
        assert!(guest.has_come());
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
        guest.assert_undone();
    }

    // It is lost: this is all there is of the guest.
    let mut guest = left;
    guest.is_taken();
}

#[test]
fn a_recovery_whose_source_is_silent_leaves_all_that_has_come() {
    let [ready, committing, placed] = [(); 3].map(|()| Guest::new());
    let engines = [
        (&ready, ready.scene.pulled()),
        (&committing, committing.committing()),
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
        assert!(guest.has_come());
        assert_eq!(guest.owners(), (false, false));
    }
    // The operator decides, either way.
    for (mut guest, wish) in [
        (ready, Wish::GiveUp),
        (committing, Wish::Own),
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
            let engine = guest.owned(Role::Destination, Recovered::Undone);
            engine.end();
            assert_eq!(guest.scene.journal(Role::Destination), None);
            continue;
        }
        guest.is_taken();
    }
}

#[test]
fn a_source_that_answers_is_not_lost() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    destination.crash();
    let why = guest.refused(Role::Destination, Wish::Own);
    assert!(why.contains("host1 is not lost, it answers"), "{why}");
    assert!(guest.has_come());
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
    let why = guest.refused(Role::Source, Wish::GiveUp);
    assert!(why.contains("only host host2 knows"), "{why}");
    source.crash();
    assert_eq!(guest.refused(Role::Source, Wish::GiveUp), why);
    let here = guest.scene.recovery(Role::Source, Wish::Settle);
    let mut there = guest.scene.recovery(Role::Destination, Wish::Settle);
    guest.arrives(&mut there);
    guest.leaves(here);
    there.end();
    guest.assert_moved();
}

#[test]
fn an_engine_that_waits_for_a_lost_host_is_ended_by_the_operators_word() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.crash();
    source.let_go();
    let engine = guest.owned(Role::Source, Recovered::Stays);
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
fn a_source_that_cannot_write_down_that_it_has_the_guest_is_told_again() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    destination.crash();
    // Where it is written before it takes its place.
    let mut part = guest.scene.journal_path(Role::Source).into_os_string();
    part.push(".part");
    std::fs::create_dir(&part).unwrap();
    let mut there = guest.scene.recovery(Role::Destination, Wish::GiveUp);
    assert_eq!(recovered(&mut there), Recovered::Undone);
    there.end();
    assert_eq!(guest.scene.journal(Role::Source).unwrap().state, State::Committed);
    let journal = guest.scene.journal(Role::Destination);
    assert_eq!(journal.map(|journal| journal.state), Some(State::Aborted));
    std::fs::remove_dir(&part).unwrap();
    assert_eq!(guest.scene.recover(Role::Destination), Recovered::Undone);
    source.end_aborted();
    guest.assert_undone();
}

#[test]
fn a_copy_that_waits_gives_way_to_its_own_source_only() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.pulled();
    destination.crash();
    source.end_aborted();
    let Some(machine) = guest.scene.journal(Role::Destination).unwrap().peer_machine else {
        println!("SKIPPED: nothing tells this machine from another");
        return;
    };
    // Another host, another machine of that name, and one that an earlier release did not ask.
    let others = [
        ("host3", Some(machine)),
        ("host1", Some(Digest([7; 32]))),
        ("host1", None),
    ];
    for (peer, machine) in others {
        guest.scene.change_journal(Role::Destination, |journal| {
            (journal.peer, journal.peer_machine) = (peer.into(), machine);
        });
        let why = guest.scene.refused().cause;
        assert!(
            why.contains(&format!("has come here from {peer} before")),
            "{why}"
        );
        assert!(guest.has_come());
    }

    // Its own one has been interrupted while the files got their names: they may be what other guests stand on by now.
    guest.scene.change_journal(Role::Destination, |journal| {
        (journal.peer_machine, journal.state) = (Some(machine), State::Committing);
    });
    let temporary = guest.scene.journal(Role::Destination).unwrap().entries[0]
        .temporary
        .clone()
        .unwrap();
    std::fs::rename(&temporary, guest.there()).unwrap();
    let why = guest.scene.refused().cause;
    assert!(
        why.contains("though host1 has the guest") && !why.contains("--lost"),
        "{why}"
    );
    assert!(guest.has_come());
    std::fs::rename(guest.there(), &temporary).unwrap();
    guest.assert_stays_and_moves_again();
}

#[test]
fn what_another_guest_uses_by_now_stays_where_it_was_put() {
    let guest = Guest::new();
    let (source, mut destination) = guest.scene.placed();
    let other = std::fs::File::open(guest.there()).unwrap();
    ofd_read_lock(&other, 100);
    assert_eq!(destination.ask(&Request::ColdAbort), Reply::ColdAborted);
    destination.end();
    source.end_aborted();
    assert!(guest.there().exists(), "another guest's base was removed");
    drop(other);
    std::fs::remove_file(guest.there()).unwrap();
    guest.check();
    guest.assert_undone();
}

#[test]
fn what_another_guest_has_come_to_use_stays() {
    let guest = Guest::new();
    let (source, destination) = guest.scene.placed();
    source.crash();
    destination.crash();
    // By another mount, where that can be made.
    let pool = guest.scene.directory.path().join("pool");
    let mount = Mount::bind(&guest.scene.destination(), &pool);
    let base = [Kept {
        path: mount.as_ref().map_or(guest.there(), |_| pool.join("disk.raw")),
        reason: "guest g2 needs it".into(),
    }];
    let mut there = guest
        .scene
        .recovery_beside(Role::Destination, Wish::GiveUp, &base);
    assert_eq!(recovered(&mut there), Recovered::Undone);
    there.end();
    assert_eq!(sha256(&guest.there()), guest.digest);
    // The source has not been told. Asked again, when nothing is known to need it, it is still not this session's.
    let entry = guest.scene.journal(Role::Destination).unwrap().entries.remove(0);
    assert_eq!(
        (entry.identity, entry.lasting, entry.temporary),
        (None, None, None)
    );
    assert_eq!(guest.scene.recover(Role::Destination), Recovered::Undone);
    assert_eq!(sha256(&guest.there()), guest.digest);
}
