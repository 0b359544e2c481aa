//! Everything this room does, on a real QEMU: TCG always, KVM where it opens.
//!
//! The guest is a boot sector in real mode that adds one to a byte of each of 128 pages, for ever.

mod common;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

use common::qemu::{find_ram, holds_all_written, scan, track, Qemu, SHARED_FILE, SIZE};
use common::{await_some, await_that, deadline, report, Child};
use ferry_engine::live::inspect;
use ferry_engine::memory::{PageSet, TrackError, WriteTracker, PAGE};
use ferry_engine::qemu::{
    discover, inject, stands, tracked_ranges, Devices, DiscoverError, Ineligible, MigrationStatus, Monitor,
    MonitorError, Narrow, Process, Version,
};
use nix::sys::signal::Signal;
use serde_json::json;
use uuid::Uuid;

/// Whether the guest's vCPUs run.
fn runs(monitor: &mut Monitor) -> bool {
    let answer = monitor.execute("query-status", json!({}), deadline());
    answer.expect("query-status")["running"] == true
}

/// The whole way: find, inject, arm, drain, rounds of scan and copy, stop, last scan; the copy equals the RAM.
fn tracks_a_guest(accelerator: &str) {
    let Some(qemu) = Qemu::with_shared_file(accelerator) else {
        return;
    };
    let mut monitor = qemu.monitor();
    assert_eq!(monitor.peer_pid().expect("the peer"), qemu.child.id() as i32);
    let (process, blocks) = find_ram(&mut monitor);
    let [ram] = &blocks[..] else {
        panic!("one block expected: {blocks:?}")
    };
    assert_eq!(
        (ram.name.as_str(), ram.backend.as_str(), ram.size),
        ("pc.ram", "pc.ram", SIZE)
    );
    assert_eq!(ram.file.path(), qemu.directory.path().join("ram"));

    let mut tracker = track(&process, &blocks);
    monitor.drain(deadline(), || false).expect("a drain");
    let mut copy = vec![0; SIZE as usize];
    let fetch = |set: &PageSet, copy: &mut [u8]| {
        for run in set.runs() {
            ram.file
                .read_at(run.start, &mut copy[run.start as usize..run.end as usize])
                .expect("reading RAM");
        }
    };
    fetch(&PageSet::full(SIZE), &mut copy);

    monitor.execute("cont", json!({}), deadline()).expect("cont");
    // The BIOS runs first; then every scan holds all the pages the guest writes, given the time for one round.
    let mut rounds = 0;
    let mut complete = 0;
    await_that("the guest to write its pages many times", || {
        let set = scan(&mut tracker);
        monitor.drain(deadline(), || false).expect("a drain");
        fetch(&set, &mut copy);
        rounds += 1;
        complete += u32::from(holds_all_written(&set));
        complete >= 20
    });
    monitor.execute("stop", json!({}), deadline()).expect("stop");
    monitor.drain(deadline(), || false).expect("a drain");
    fetch(&scan(&mut tracker), &mut copy);
    assert!(scan(&mut tracker).is_empty(), "a stopped guest does not write");
    let mut original = vec![0; SIZE as usize];
    ram.file.read_at(0, &mut original).expect("reading RAM");
    let wrong = (0..SIZE / PAGE).find(|page| {
        let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
        original[bytes.clone()] != copy[bytes]
    });
    assert_eq!(wrong, None, "a page differs from its copy after {rounds} rounds");
    println!("{accelerator}: {rounds} rounds, {complete} with all of the guest's pages");

    // With nothing left behind, all of it works again.
    drop(tracker);
    let fds = std::fs::read_dir(process.proc_path("fd")).expect("QEMU's descriptors");
    for fd in fds.filter_map(|fd| std::fs::read_link(fd.expect("an entry").path()).ok()) {
        assert!(!fd.to_string_lossy().contains("userfaultfd"), "QEMU keeps a copy");
    }
    let mut again = track(&process, &blocks);
    monitor.execute("cont", json!({}), deadline()).expect("cont");
    await_that("writes seen by the second tracker", || {
        holds_all_written(&scan(&mut again))
    });
}

#[test]
fn tracks_a_tcg_guest() {
    tracks_a_guest("tcg");
}

#[test]
fn tracks_a_kvm_guest() {
    tracks_a_guest("kvm");
}

/// The engine is killed in the middle of its work: the guest must run on as if it had never been there, and the next
/// engine must find everything free.
fn survives_the_end_of_the_engine(accelerator: &str) {
    let Some(qemu) = Qemu::with_shared_file(accelerator) else {
        return;
    };
    let mut monitor = qemu.monitor();
    let (process, blocks) = find_ram(&mut monitor);
    monitor.execute("cont", json!({}), deadline()).expect("cont");

    let uffd = inject::userfaultfd(&process, deadline()).expect("injection");
    let raw = uffd.as_raw_fd();
    let mut tracker = WriteTracker::new(uffd, &process, tracked_ranges(&blocks)).expect("registration");
    tracker.arm().expect("arming");
    // An engine in a process of its own, which holds the only copy once ours is closed without un-registering.
    let mut engine = Child::fork(|pipe| {
        report(pipe, 0, 0);
        let mut byte = [0];
        let _ = pipe.read(&mut byte);
    });
    engine.answer();
    // SAFETY: closes our copy; the tracker is forgotten below, so nobody uses or closes the number again.
    unsafe { libc::close(raw) };
    std::mem::forget(tracker);
    let busy = inject::userfaultfd(&process, deadline()).expect("injection");
    let busy = WriteTracker::new(busy, &process, tracked_ranges(&blocks));
    assert!(
        matches!(busy, Err(TrackError::Busy { .. })),
        "the first engine still tracks: {busy:?}"
    );

    engine.signal(Signal::SIGKILL);
    drop(engine);
    assert!(process.is_alive());
    assert!(runs(&mut monitor));
    let mut next = await_some("the memory to be free", || {
        let uffd = inject::userfaultfd(&process, deadline()).expect("injection");
        WriteTracker::new(uffd, &process, tracked_ranges(&blocks)).ok()
    });
    next.arm().expect("arming");
    await_that("the guest to write on", || holds_all_written(&scan(&mut next)));
}

#[test]
fn a_tcg_guest_survives_the_end_of_the_engine() {
    survives_the_end_of_the_engine("tcg");
}

#[test]
fn a_kvm_guest_survives_the_end_of_the_engine() {
    survives_the_end_of_the_engine("kvm");
}

#[test]
fn several_blocks_in_a_file_and_in_unlinked_files_are_found() {
    let arguments = [
        "-object",
        "memory-backend-file,id=ram-node0,size=64M,mem-path=DIR/ram,share=on",
        "-object",
        "memory-backend-file,id=memdimm0,size=32M,mem-path=DIR,share=on",
        "-object",
        "memory-backend-file,id=memvm0,size=128M,mem-path=DIR/virtio-mem,share=on,reserve=off",
        "-object",
        "memory-backend-ram,id=unused,size=16M",
        "-device",
        "pc-dimm,memdev=memdimm0,id=dimm0",
        "-device",
        "virtio-mem-pci,memdev=memvm0,id=vm0",
        "-device",
        "VGA",
        "-machine",
        "pc",
        "-numa",
        "node,memdev=ram-node0",
        "-m",
        "64M,slots=2,maxmem=1G",
    ];
    let Some(qemu) = Qemu::start("tcg", &arguments) else {
        return;
    };
    let mut monitor = qemu.monitor();
    let (process, blocks) = find_ram(&mut monitor);
    let mut found: Vec<_> = blocks
        .iter()
        .map(|ram| (ram.backend.as_str(), ram.size >> 20))
        .collect();
    found.sort_unstable();
    assert_eq!(found, [("memdimm0", 32), ("memvm0", 128), ("ram-node0", 64)]);
    assert!(
        blocks
            .iter()
            .any(|ram| ram.name != ram.backend && ram.name.ends_with("/memvm0")),
        "{blocks:?}"
    );
    // Stores by QEMU itself go through the same mappings.
    for ram in &blocks {
        ram.file.write_at(0, b"ferry").expect("writing RAM");
        assert_eq!(ram.file.len(), ram.size);
    }
    track(&process, &blocks);
}

/// The reasons why a guest with these arguments is not eligible.
fn refusal(arguments: &[&str]) -> Option<Vec<Ineligible>> {
    let qemu = Qemu::start("tcg", arguments)?;
    let mut monitor = qemu.monitor();
    let process = Process::open(monitor.peer_pid().expect("the peer")).expect("QEMU");
    match discover(&mut monitor, &process, deadline()) {
        Err(DiscoverError::Ineligible(reasons)) => {
            println!("{}", DiscoverError::Ineligible(reasons.clone()));
            Some(reasons)
        }
        other => panic!("{arguments:?} must not be eligible: {other:?}"),
    }
}

#[test]
fn guests_that_cannot_be_moved_are_refused_with_the_reason() {
    let is = |arguments: &[&str], expected: fn(&Ineligible) -> bool| {
        let Some(reasons) = refusal(arguments) else { return };
        assert!(
            reasons.len() == 1 && expected(&reasons[0]),
            "{arguments:?}: {reasons:?}"
        );
    };
    let with = |more: &[&'static str]| [&SHARED_FILE[..], more].concat();

    is(&["-m", "64M"], |reason| {
        matches!(reason, Ineligible::Private { .. })
    });
    is(
        &[
            "-object",
            "memory-backend-file,id=pc.ram,size=64M,mem-path=DIR/ram,share=off",
            "-machine",
            "pc,memory-backend=pc.ram",
            "-m",
            "64M",
        ],
        |reason| matches!(reason, Ineligible::Private { .. }),
    );
    is(
        &[
            "-object",
            "memory-backend-memfd,id=pc.ram,size=64M,share=on",
            "-machine",
            "pc,memory-backend=pc.ram",
            "-m",
            "64M",
        ],
        |reason| matches!(reason, Ineligible::NotAFile { kind, .. } if kind == "memory-backend-memfd"),
    );
    is(
        &[
            "-object",
            "memory-backend-file,id=pc.ram,size=64M,mem-path=/var/tmp,share=on",
            "-machine",
            "pc,memory-backend=pc.ram",
            "-m",
            "64M",
        ],
        |reason| matches!(reason, Ineligible::Unusable { why, .. } if why.contains("not on tmpfs")),
    );
    is(
        &with(&[
            "-object",
            "memory-backend-file,id=shm,size=1M,mem-path=DIR/shm,share=on",
            "-device",
            "ivshmem-plain,memdev=shm,id=shmem0",
        ]),
        |reason| matches!(reason, Ineligible::OutsideWriter { what, .. } if what.contains("shmem0")),
    );
    is(
        &with(&[
            "-object",
            "memory-backend-ram,id=memdimm0,size=32M",
            "-device",
            "pc-dimm,memdev=memdimm0",
            "-m",
            "64M,slots=1,maxmem=1G",
        ]),
        |reason| matches!(reason, Ineligible::Private { backend } if backend == "memdimm0"),
    );
    is(
        &with(&[
            "-object",
            "memory-backend-file,id=memdimm0,size=32M,mem-path=DIR/ram,share=on",
            "-device",
            "pc-dimm,memdev=memdimm0",
            "-m",
            "64M,slots=1,maxmem=1G",
        ]),
        |reason| matches!(reason, Ineligible::Unusable { why, .. } if why.contains("another RAM block")),
    );
}

#[test]
fn vhost_user_is_refused() {
    // QEMU connects to the back end and waits for its features, so somebody has to answer: this listener says "none".
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("vhost");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
    std::thread::spawn(move || serve_vhost_user(&listener));
    let chardev = format!("socket,id=c0,path={}", path.display());
    let arguments = [
        &SHARED_FILE[..],
        &["-chardev", &chardev, "-netdev", "vhost-user,id=n0,chardev=c0"],
    ]
    .concat();
    let Some(reasons) = refusal(&arguments) else {
        return;
    };
    assert!(
        matches!(&reasons[..], [Ineligible::OutsideWriter { what, .. }] if what.contains("n0")),
        "{reasons:?}"
    );
}

/// Answers every request that wants an answer with the number 0: the least a vhost-user back end can be.
fn serve_vhost_user(listener: &std::os::unix::net::UnixListener) {
    const GET_FEATURES: u32 = 1;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    const GET_QUEUE_NUM: u32 = 17;
    let Ok((mut stream, _)) = listener.accept() else {
        return;
    };
    let mut header = [0; 12];
    while stream.read_exact(&mut header).is_ok() {
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut payload = vec![0; word(8) as usize];
        if stream.read_exact(&mut payload).is_err() {
            return;
        }
        if matches!(word(0), GET_FEATURES | GET_PROTOCOL_FEATURES | GET_QUEUE_NUM) {
            let mut answer = header[..4].to_vec();
            answer.extend(5_u32.to_ne_bytes());
            answer.extend(8_u32.to_ne_bytes());
            answer.extend(0_u64.to_ne_bytes());
            let _ = stream.write_all(&answer);
        }
    }
}

/// A QEMU that writes device state keeps its big lock for as long as its narrowed stream is not read: its devices cannot
/// change memory meanwhile, and its monitor does not answer.
#[test]
fn a_narrow_stream_keeps_qemu_from_going_on() {
    let Some(qemu) = Qemu::with_shared_file("tcg") else {
        return;
    };
    let path = qemu.directory.path().join("door");
    let door = UnixListener::bind(&path).expect("a socket");
    let process = Arc::new(Process::open(qemu.child.id() as i32).expect("QEMU"));
    let mut monitor = qemu.monitor();
    let (seen, states) = mpsc::channel();
    monitor.listen(move |event| {
        if let Some(state) = event.data.get("status").and_then(|state| state.as_str()) {
            let _ = seen.send(state.to_owned());
        }
    });
    monitor
        .set_ignore_shared(true, deadline())
        .expect("x-ignore-shared");
    for capability in ["events", "pause-before-switchover"] {
        let on = json!({ "capabilities": [{ "capability": capability, "state": true }] });
        monitor
            .execute("migrate-set-capabilities", on, deadline())
            .expect(capability);
    }
    monitor.execute("cont", json!({}), deadline()).expect("cont");
    let to = json!({ "uri": format!("unix:{}", path.display()) });
    monitor.execute("migrate", to, deadline()).expect("migrate");
    let mut stream = door.accept().expect("QEMU").0;
    let until = |monitor: &mut Monitor, wanted: &str| {
        await_that(wanted, || {
            monitor.hear(64).expect("the monitor");
            states.try_iter().any(|state| state == wanted)
        })
    };

    // What it says before it stops is read, all of it: it is silent from then on.
    until(&mut monitor, "pre-switchover");
    let mut early = stream.try_clone().expect("the stream");
    early.set_nonblocking(true).expect("the stream");
    let mut sink = vec![0; 1 << 20];
    let mut devices = Devices::default();
    let mut read = || {
        while let Ok(count @ 1..) = early.read(&mut sink) {
            devices.look(&sink[..count]);
            if devices.found() {
                return true;
            }
        }
        false
    };
    assert!(!read());
    let narrow = Narrow::new(&process, &path).expect("narrowed");
    let go_on = json!({ "state": "pre-switchover" });
    // It may stand in its write before it has answered.
    let answer = monitor.execute(
        "migrate-continue",
        go_on,
        Instant::now() + Duration::from_millis(500),
    );
    assert!(
        matches!(answer, Ok(_) | Err(MonitorError::Timeout { .. })),
        "{answer:?}"
    );
    until(&mut monitor, "device");
    await_that("the first device", read);
    await_that("QEMU to stand", || stands(&stream).expect("the stream"));
    let silent = monitor.execute(
        "query-status",
        json!({}),
        Instant::now() + Duration::from_millis(500),
    );
    assert!(matches!(silent, Err(MonitorError::Timeout { .. })), "{silent:?}");

    drop(narrow);
    early.set_nonblocking(false).expect("the stream");
    let reading = std::thread::spawn(move || std::io::copy(&mut stream, &mut std::io::sink()));
    until(&mut monitor, "completed");
    let state = monitor.execute("query-status", json!({}), deadline());
    assert_eq!(state.expect("query-status")["status"], "postmigrate");
    drop((early, door, qemu));
    reading.join().expect("a thread").expect("the stream");
}

#[test]
fn the_monitor_asks_and_listens() {
    let Some(qemu) = Qemu::with_shared_file("tcg") else {
        return;
    };
    let mut monitor = qemu.monitor();
    assert!(
        monitor.version().expect("a version")
            >= Version {
                major: 7,
                minor: 2,
                micro: 0
            }
    );
    assert_eq!(
        monitor.migration_status(deadline()).expect("query-migrate"),
        MigrationStatus::None
    );
    assert_eq!(monitor.downtime_limit_ms(deadline()).expect("parameters"), 300);
    for on in [true, false] {
        monitor
            .set_ignore_shared(on, deadline())
            .expect("set-capabilities");
        assert_eq!(monitor.ignore_shared(deadline()).expect("query-capabilities"), on);
    }
    assert!(!runs(&mut monitor));
    let unknown = monitor
        .execute("no-such-command", json!({}), deadline())
        .expect_err("an unknown command");
    assert!(
        matches!(&unknown, MonitorError::Refused { class, .. } if class == "CommandNotFound"),
        "{unknown}"
    );

    assert_eq!(monitor.poll_event().expect("no event"), None);
    monitor.execute("cont", json!({}), deadline()).expect("cont");
    monitor.execute("stop", json!({}), deadline()).expect("stop");
    let mut names = Vec::new();
    while names.len() < 2 {
        names.push(
            monitor
                .next_event(deadline())
                .expect("an event")
                .expect("in time")
                .name,
        );
    }
    assert_eq!(names, ["RESUME", "STOP"]);

    // A deadline in the past: given up at once; the late answer is not taken for the next command's.
    let late = monitor.execute("query-qmp-schema", json!({}), Instant::now());
    assert!(matches!(late, Err(MonitorError::Timeout { .. })), "{late:?}");
    assert!(!runs(&mut monitor));

    // A second client is not served while the first is there.
    let soon = Instant::now() + Duration::from_millis(100);
    let second = Monitor::connect(&qemu.directory.path().join("qmp"), soon);
    assert!(matches!(second, Err(MonitorError::Timeout { .. })), "{second:?}");
    let nobody = Monitor::connect(Path::new("/nonexistent"), deadline());
    assert!(matches!(nobody, Err(MonitorError::Connect { .. })));

    let _ = monitor.execute("quit", json!({}), deadline());
    let closed = loop {
        match monitor.next_event(deadline()) {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert!(matches!(closed, Err(MonitorError::Closed { .. })), "{closed:?}");
}

/// A monitor that was found by a name and a number is not believed to be the guest's.
#[test]
fn another_guests_monitor_is_left_alone() {
    let Some(qemu) = Qemu::with_shared_file("tcg") else {
        return;
    };
    let monitor = qemu.directory.path().join("qmp");
    let look = |guest| inspect::look(&monitor, Some(guest), Arc::default()).map(|looked| looked.blocks.len());
    // QEMU's own, where it is told none.
    assert_eq!(look(Uuid::nil()).expect("the guest itself"), 1);
    let why = look(Uuid::from_u128(7)).expect_err("another guest").to_string();
    assert!(
        why.contains("is that of guest 00000000-0000-0000-0000-000000000000"),
        "{why}"
    );
}
