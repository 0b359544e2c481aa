//! x-ignore-shared, which lets the engine carry a guest's memory past QEMU, would cost the guest its memory if anything but our
//! own migration met it. Nothing does, whoever dies while it is on, and whatever writes the guest's memory next.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;

use anyhow::{ensure, Context, Error, Result};
use ferry_tests::fault::Disturbed::StopAndCopy;
use ferry_tests::fault::{engine, signal};
use ferry_tests::guest::Rate;
use ferry_tests::host::{Host, Process};
use ferry_tests::lab::{Lab, Options};
use ferry_tests::link::Slow;
use ferry_tests::monitor::IgnoreShared;
use ferry_tests::phases::{Phases, LIVE, PROTECTED};
use ferry_tests::scene::{said, usual, Scene, PATIENCE};
use ferry_tests::wait::{wait_for, wait_until};
use nix::sys::signal::Signal::{SIGCONT, SIGKILL, SIGSTOP};

/// What the slow link lets through, Mbit a second.
const LINK: u32 = 80;

/// What the usual guest holds at least, in bytes: what it has filled, and what it keeps writing.
const MEMORY: u64 = (24 + 64) << 20;

/// Where each way below puts its files, as the hosts see it.
const OUT: &str = "/lab/out";

/// One way to have QEMU write a guest's memory, and to live on with what was written.
type Way = (&'static str, fn(&Scene, &Host) -> Result<()>);

/// Those after which the guest is where it was.
const WAYS: [Way; 11] = [
    ("save", |scene, host| saved(scene, host, &[])),
    ("save with flags", |scene, host| {
        saved(scene, host, &["--running"])
    }),
    ("save with parameters", |scene, host| {
        saved(scene, host, &["--image-format", "raw"])
    }),
    ("managed save", |scene, host| {
        host.virsh(&["managedsave", scene.name()])?;
        host.virsh(&["start", scene.name()])?;
        Ok(())
    }),
    ("dump", |scene, host| dumped(scene, host, &[])),
    ("memory-only dump", |scene, host| {
        dumped(scene, host, &["--memory-only"])
    }),
    ("memory-only dump in a format", |scene, host| {
        dumped(scene, host, &["--memory-only", "--format", "elf"])
    }),
    ("migration by hand", |scene, host| {
        let file = format!("{OUT}/by-hand");
        host.qmp(
            scene.name(),
            &format!(r#"{{"execute":"migrate","arguments":{{"uri":"file:{file}"}}}}"#),
        )?;
        wait_until("QEMU to have written", PATIENCE, || {
            let answer = host.qmp(scene.name(), r#"{"execute":"query-migrate"}"#)?;
            let status = answer["return"]["status"].as_str().unwrap_or_default();
            ensure!(status != "failed", "{answer}");
            Ok(status == "completed")
        })?;
        holds_the_memory(host, &file)?;
        host.virsh(&["resume", scene.name()])?;
        Ok(())
    }),
    ("monitor command with files", |scene, host| {
        // A question is passed on as it is.
        let command = r#"{"execute":"cont"}"#;
        host.virsh(&["qemu-monitor-command", "--pass-fds", "0", scene.name(), command])?;
        Ok(())
    }),
    ("internal snapshot", |scene, host| {
        host.virsh(&["snapshot-create-as", scene.name(), "inside"])?;
        host.virsh(&["snapshot-revert", scene.name(), "inside"])?;
        scene.goes_back()?;
        scene.lives_on(host)?;
        host.virsh(&["snapshot-delete", scene.name(), "inside"])?;
        Ok(())
    }),
    ("external snapshot", |scene, host| {
        let memory = format!("{OUT}/outside.memory");
        host.virsh(&[
            "snapshot-create-as",
            scene.name(),
            "outside",
            "--memspec",
            &memory,
            "--diskspec",
            &format!("vda,file={OUT}/outside.qcow2"),
        ])?;
        holds_the_memory(host, &memory)?;
        host.virsh(&["snapshot-revert", scene.name(), "outside"])?;
        scene.goes_back()?;
        Ok(())
    }),
];

/// libvirt's own migrations, one after the other from host to host.
const MOVES: [Way; 4] = [
    ("native migration", |scene, host| natively(scene, host, &[])),
    ("native migration, peer-to-peer", |scene, host| {
        natively(scene, host, &["--p2p"])
    }),
    ("migration to a host that declines", |scene, host| {
        let two = scene.lab.host(2);
        let config = two.path("/etc/virt-ferry/virt-ferry.toml");
        fs::write(&config, "nonsense = true\n")?;
        host.migrate(scene.name(), two, &[])?;
        Ok(fs::remove_file(&config)?)
    }),
    ("migration by an old client", |scene, host| {
        Phases::new(scene, host, other(scene.lab, host), LIVE)?
            .migrate_as_of_old()?
            .map_err(Error::msg)
    }),
];

fn other<'a>(lab: &'a Lab, host: &Host) -> &'a Host {
    let number = if host.name() == lab.host(1).name() { 2 } else { 1 };
    lab.host(number)
}

fn holds_the_memory(host: &Host, file: &str) -> Result<()> {
    let length = fs::metadata(host.path(file))
        .with_context(|| file.to_owned())?
        .len();
    ensure!(length >= MEMORY, "{length} bytes in {file}: no memory");
    Ok(())
}

fn saved(scene: &Scene, host: &Host, options: &[&str]) -> Result<()> {
    let file = format!("{OUT}/saved");
    host.virsh(&[&["save", scene.name(), &file], options].concat())?;
    holds_the_memory(host, &file)?;
    host.virsh(&["restore", &file])?;
    Ok(())
}

fn dumped(scene: &Scene, host: &Host, options: &[&str]) -> Result<()> {
    let file = format!("{OUT}/dumped");
    host.virsh(&[&["dump", scene.name(), &file], options].concat())?;
    holds_the_memory(host, &file)?;
    Ok(fs::remove_file(host.path(&file))?)
}

/// A compression that the engine does not know.
fn natively(scene: &Scene, host: &Host, options: &[&str]) -> Result<()> {
    let native = ["--compressed", "--comp-methods", "xbzrle"];
    host.migrate(scene.name(), other(scene.lab, host), &[&native, options].concat())?;
    Ok(())
}

fn is_off(scene: &Scene, host: &Host) -> Result<()> {
    let now = host.ignores_shared(scene.name())?.context("no private monitor")?;
    let off = IgnoreShared {
        on: false,
        marked: false,
    };
    ensure!(now == off, "{now:?}");
    Ok(())
}

/// The engine and the daemon died at once: nobody has cleared it, and the daemon that runs now knows of nothing.
#[test]
fn nothing_is_written_without_the_memory() -> Result<()> {
    const DISK: &str = "/lab/out/guarded.qcow2";
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        fs::create_dir(one.path(OUT))?;
        fs::set_permissions(one.path(OUT), fs::Permissions::from_mode(0o777))?;
        one.run(&["qemu-img", "create", "-q", "-f", "qcow2", DISK, "16M"])?;
        let scene = Scene::start(lab, one, usual("guarded").rate(Rate(200)).disk(DISK, "qcow2"), 1)?;
        let mut host = one;
        for (name, way) in MOVES {
            host.leave_ignoring_shared(scene.name())?;
            println!("{name}");
            way(&scene, host).context(name)?;
            host = other(lab, host);
            scene.lives_on(host).context(name)?;
            is_off(&scene, host).context(name)?;
        }
        ensure!(two.state(scene.name())?.is_none(), "the guest is not back");
        one.make_persistent(scene.name())?;
        for (name, way) in WAYS {
            one.leave_ignoring_shared(scene.name())?;
            println!("{name}");
            way(&scene, one).context(name)?;
            scene.lives_on(one).context(name)?;
            is_off(&scene, one).context(name)?;
        }
        // libvirt looks after guests from its start on, whether or not anybody asks it for anything.
        one.leave_ignoring_shared(scene.name())?;
        one.restart_libvirtd(true)?;
        is_off(&scene, one).context("a daemon has started")
    })
}

/// Who dies on the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Engine,
    Daemon,
    Both,
}

const VICTIMS: [Victim; 3] = [Victim::Engine, Victim::Daemon, Victim::Both];

fn daemon(host: &Host) -> Result<Process> {
    host.processes_named("libvirtd")?.pop().context("no daemon")
}

impl Victim {
    /// Kills it, and starts the daemon anew where that died.
    fn die(self, host: &Host) -> Result<()> {
        let (engine, daemon) = (engine(host)?, daemon(host)?);
        if self != Victim::Engine {
            signal(&daemon, SIGKILL)?;
        }
        if self != Victim::Daemon {
            signal(&engine, SIGKILL)?;
        }
        match self {
            Victim::Engine => Ok(()),
            Victim::Daemon | Victim::Both => host.restart_libvirtd(true),
        }
    }
}

/// The host where the guest runs in the end; it keeps its memory there, and host1 is where it is afterwards.
fn lives_somewhere(scene: &Scene) -> Result<()> {
    let (one, two) = (scene.lab.host(1), scene.lab.host(2));
    let host = wait_for("the guest to run somewhere", PATIENCE, || {
        for host in [one, two] {
            let state = host.state(scene.name())?;
            if state.is_some_and(|state| state.starts_with("running")) {
                return Ok(Some(host));
            }
        }
        Ok(None)
    })?;
    wait_until("the other host to forget the guest", PATIENCE, || {
        Ok(other(scene.lab, host).state(scene.name())?.is_none())
    })?;
    let left = host.ignores_shared(scene.name())?.context("no private monitor")?;
    ensure!(!left.on, "left on on {}", host.name());
    scene.survives_save_and_restore(host)?;
    scene.is_unharmed(host)?;
    if host.name() == two.name() {
        scene.move_to(two, one, &[])?;
    }
    Ok(())
}

/// As [`peer_gone`] for pre-copy and stop-and-copy.
#[test]
fn whoever_dies_before_perform_or_after_the_commitment() -> Result<()> {
    const COMMITTED: &str = "the destination holds all of the guest's memory";
    Lab::with(
        Options::default().libvirtd_env("VIRT_FERRY_LOG", "debug"),
        |lab| {
            let (one, two) = (lab.host(1), lab.host(2));
            let scene = Scene::start(lab, one, usual("survivor"), 1)?;
            for victim in VICTIMS {
                let context = || format!("{victim:?} before Perform");
                let mut client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
                let (xml, cookie) = client.begin()?;
                client.prepare(&xml, &cookie)?.map_err(Error::msg)?;
                victim.die(one)?;
                drop(client);
                lives_somewhere(&scene).with_context(context)?;
            }
            for victim in VICTIMS {
                let context = || format!("{victim:?} after the commitment");
                let before = said(one, COMMITTED);
                let slow = Slow::to(lab, two, LINK)?;
                let mut underway = one.begin_migration(scene.name(), two, &[])?;
                underway.reaches(StopAndCopy)?;
                // Its Perform does not return, so that the engine is not told of it.
                let daemon = daemon(one)?;
                signal(&daemon, SIGSTOP)?;
                drop(slow);
                wait_until("the destination to commit", PATIENCE, || {
                    Ok(said(one, COMMITTED) > before)
                })?;
                victim.die(one)?;
                if victim == Victim::Engine {
                    signal(&daemon, SIGCONT)?;
                }
                underway.end()?;
                lives_somewhere(&scene).with_context(context)?;
            }
            Ok(())
        },
    )
}

/// libvirt copies disks within its Perform: it is on for as long as that takes.
#[test]
fn whoever_dies_while_disks_are_copied() -> Result<()> {
    const DISK: &str = "/var/lib/libvirt/images/copied.raw";
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        one.image(DISK, 64)?;
        two.image(DISK, 64)?;
        // No holes, so that there is much to copy; and few writes, so that the memory passes the slow link.
        one.run(&[
            "dd",
            "if=/dev/urandom",
            &format!("of={DISK}"),
            "bs=1M",
            "count=64",
            "status=none",
        ])?;
        let guest = usual("copied")
            .filled(16)
            .rate(Rate(100))
            .disk(DISK, "raw")
            .disk_load(16, Rate(40));
        let scene = Scene::start(lab, one, guest, 1)?;
        for victim in VICTIMS {
            let context = || format!("{victim:?}");
            let slow = Slow::to(lab, two, LINK)?;
            let mut underway = one.begin_migration(scene.name(), two, &["--copy-storage-all"])?;
            underway
                .wait_for_job("disks to be copied", |job| job.figure("disk_total") > 0)
                .with_context(context)?;
            victim.die(one)?;
            drop(slow);
            underway.fails()?;
            lives_somewhere(&scene).with_context(context)?;
        }
        Ok(())
    })
}

/// libvirt's job ends with QEMU's migration, and whoever waits for it begins at once; also a client that has known the guest
/// since it was shut off, and tells libvirt so.
#[test]
fn a_save_that_waits_for_a_migration_has_the_memory() -> Result<()> {
    const WAITS: &str = "waits for its migration to end";
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("queued").working_set(32).rate(Rate::mib(64)), 1)?;
        one.make_persistent(scene.name())?;
        scene.move_to(one, two, &[])?;
        let mut client = Phases::new(&scene, one, two, 0)?;
        client.look()?;
        scene.move_to(two, one, &[])?;
        let ends: [Way; 2] = [
            ("killed", |_, host| signal(&engine(host)?, SIGKILL)),
            ("cancelled", |scene, host| {
                host.virsh(&["domjobabort", scene.name()]).map(drop)
            }),
        ];
        for (name, end) in ends {
            let before = said(one, WAITS);
            let slow = Slow::to(lab, two, LINK)?;
            let mut underway = one.begin_migration(scene.name(), two, &[])?;
            underway.reaches(StopAndCopy)?;
            let file = format!("/lab/{name}.save");
            let saved = thread::scope(|scope| {
                let saving = scope.spawn(|| client.save(&file));
                wait_until("the save to wait", PATIENCE, || Ok(said(one, WAITS) > before))?;
                end(&scene, one).context(name)?;
                underway.fails()?;
                drop(slow);
                saving.join().map_err(|_| Error::msg("the save panicked"))?
            })?;
            saved.map_err(Error::msg).context(name)?;
            one.virsh(&["restore", &file])?;
            scene.lives_on(one).context(name)?;
            scene.is_unharmed(one).context(name)?;
        }
        scene.move_to(one, two, &[])
    })
}

/// libvirt's daemon saves guests when it hears that the host shuts down.
#[test]
fn a_host_that_shuts_down_saves_the_memory() -> Result<()> {
    const BUS: &str = "<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen>\
        <auth>EXTERNAL</auth><policy context='default'><allow user='*'/><allow own='*'/><allow send_destination='*'/>\
        <allow receive_sender='*'/></policy></busconfig>";
    Lab::with(
        Options::default().qemu_conf("auto_shutdown_try_save = \"persistent\""),
        |lab| {
            let one = lab.host(1);
            let scene = Scene::start(lab, one, usual("put-to-bed"), 1)?;
            one.make_persistent(scene.name())?;
            fs::create_dir_all(one.path("/run/dbus"))?;
            fs::write(one.path("/run/bus.xml"), BUS)?;
            one.run(&["dbus-daemon", "--config-file=/run/bus.xml", "--fork"])?;
            one.restart_libvirtd(false)?;
            one.leave_ignoring_shared(scene.name())?;
            fs::write(
                lab.share().join("shutdown.py"),
                include_str!("../lib/shutdown.py"),
            )?;
            one.run(&["python3", "/lab/shutdown.py"])?;
            wait_until("the daemon to have saved the guest", PATIENCE, || {
                Ok(one.state(scene.name())?.as_deref() == Some("shut off (saved)"))
            })?;
            holds_the_memory(one, "/var/lib/libvirt/qemu/save/put-to-bed.save")?;
            one.restart_libvirtd(false)?;
            one.virsh(&["start", scene.name()])?;
            scene.lives_on(one)?;
            is_off(&scene, one)
        },
    )
}
