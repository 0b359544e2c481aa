//! What is not in order is told in one error that says what and where; the guest stays, and nothing is left behind.

use std::fs;
use std::process::{Child, Stdio};

use anyhow::{bail, ensure, Context, Result};
use base64::prelude::{Engine, BASE64_STANDARD};
use ferry_engine::wire::Identity;
use ferry_tests::fault::names;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::phases::{Phases, LIVE, PROTECTED};
use ferry_tests::scene::{said, usual, Scene, PATIENCE};
use ferry_tests::wait::wait_until;
use uuid::Uuid;

const ENGINE: &str = "/usr/lib/virt-ferry/virt-ferry-engine";

/// A migration from host1 to host2 fails with an error that names these words.
fn fails(scene: &Scene, options: &[&str], words: &[&str]) -> Result<()> {
    refused(scene, options, words)?;
    scene.is_unharmed(scene.lab.host(1))
}

/// The same, before anybody has looked what is left.
fn refused(scene: &Scene, options: &[&str], words: &[&str]) -> Result<()> {
    let (one, two) = (scene.lab.host(1), scene.lab.host(2));
    let said = one.begin_migration(scene.name(), two, options)?.fails()?;
    println!("{said}");
    names(&said, words)
}

/// The guest moves to host2 and back through the engine.
fn moves(scene: &Scene) -> Result<()> {
    let (one, two) = (scene.lab.host(1), scene.lab.host(2));
    let before = [one.moved_away()?, two.moved_away()?];
    scene.move_to(one, two, &[])?;
    scene.move_to(two, one, &["--p2p"])?;
    one.assert_moved_away(before[0] + 1)?;
    two.assert_moved_away(before[1] + 1)
}

/// Holds all ports of libvirt's range on a host until it is dropped.
struct PortsTaken(Child);

impl PortsTaken {
    fn all(host: &Host) -> Result<Self> {
        let script = "import os, socket, time\n\
                      held = [socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True) \
                      for port in range(49152, 49216)]\n\
                      open('/run/ports-taken', 'w').write(str(os.getpid()))\n\
                      time.sleep(600)";
        let holder = host
            .command("python3")
            .args(["-c", script])
            .stdout(Stdio::null())
            .spawn()?;
        let taken = PortsTaken(holder);
        let mark = host.path("/run/ports-taken");
        wait_until("all ports to be taken", PATIENCE, || {
            Ok(fs::read(&mark).is_ok_and(|pid| !pid.is_empty()))
        })?;
        Ok(taken)
    }

    fn release(self, host: &Host) -> Result<()> {
        let mark = host.path("/run/ports-taken");
        host.run(&["kill", &fs::read_to_string(&mark)?])?;
        Ok(fs::remove_file(mark)?)
    }
}

impl Drop for PortsTaken {
    fn drop(&mut self) {
        // What it started in the host ends with the lab.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_missing_engine() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("no-engine"), 1)?;

        // Nobody has been promised anything when the source finds out: libvirt's own way, and the log says why.
        one.run(&["mv", ENGINE, "/root/engine"])?;
        scene
            .move_to(one, two, &[])
            .context("without an engine on the source")?;
        let why = format!("libvirt's own migration: cannot start the engine {ENGINE}");
        ensure!(said(one, &why) == 1, "the source's log does not say why");
        one.run(&["mv", "/root/engine", ENGINE])?;
        scene.move_to(two, one, &[])?;

        // No more has the destination when it finds out: nobody has started anything there. Nor is an engine of another
        // release of any use.
        let other = format!("printf '#!/bin/sh\\necho {{}} >&0\\n' >{ENGINE} && chmod 755 {ENGINE}");
        for (options, replaced, why) in [
            (&[][..], "true", format!("cannot start the engine {ENGINE}")),
            (&["--p2p"], &other, "are both of one release?".to_owned()),
        ] {
            two.run(&["mv", ENGINE, "/root/engine"])?;
            two.run(&["sh", "-c", replaced])?;
            declines(&scene, options, &why)?;
            two.run(&["mv", "/root/engine", ENGINE])?;
            scene.move_to(two, one, &[])?;
        }
        moves(&scene)
    })
}

/// The destination finds something amiss with itself before anything has been started there: the guest moves libvirt's own
/// way, and the destination's log says why.
fn declines(scene: &Scene, options: &[&str], why: &str) -> Result<()> {
    let (one, two) = (scene.lab.host(1), scene.lab.host(2));
    let moved = one.moved_away()?;
    scene.move_to(one, two, options).with_context(|| why.to_owned())?;
    one.assert_moved_away(moved)?;
    let log = two.libvirtd_log();
    let told = |line: &str| line.contains("libvirt's own migration to this host: ") && line.contains(why);
    ensure!(log.lines().any(told), "host2's log does not say: {why}");
    Ok(())
}

#[test]
fn a_directory_that_cannot_be_written() -> Result<()> {
    const INCOMING: &str = "/run/libvirt/qemu/virt-ferry";
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("no-directory"), 1)?;
        for options in [&[][..], &["--p2p"]] {
            // Root may write anywhere but there.
            one.configure("runtime_directory = \"/proc/virt-ferry\"\n")?;
            fails(&scene, options, &["host1", "/proc/virt-ferry"]).with_context(|| format!("{options:?}"))?;
            one.configure("")?;
            moves(&scene)?;
        }
        two.run(&["rm", "-r", INCOMING])?;
        two.run(&["touch", INCOMING])?;
        declines(&scene, &[], &format!("cannot make {INCOMING}"))?;
        two.run(&["rm", INCOMING])?;
        scene.move_to(two, one, &[])?;
        moves(&scene)?;
        // Only libvirt's QEMU finds out that it must not make its socket there, as under SELinux or as another user's.
        two.run(&["chmod", "0", INCOMING])?;
        declines(&scene, &["--p2p"], "its QEMU cannot be started for the engine: ")?;
        two.run(&["chmod", "700", INCOMING])?;
        scene.move_to(two, one, &[])?;
        moves(&scene)
    })
}

/// libvirt's hooks have a word in it once QEMU runs: what that had made by then goes with it.
#[test]
fn a_guest_that_a_hook_refuses() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("refused"), 1)?;
        let hook = two.path("/etc/libvirt/hooks/qemu.d/refuses");
        fs::write(&hook, "#!/bin/sh\n[ \"$2\" != started ]\n")?;
        two.run(&["chmod", "755", "/etc/libvirt/hooks/qemu.d/refuses"])?;
        for options in [&[][..], &["--p2p"]] {
            fails(&scene, options, &["qemu", "hook"]).with_context(|| format!("{options:?}"))?;
        }
        let own = "its QEMU cannot be started for the engine: ";
        ensure!(said(two, own) == 2, "the destination's log does not say why");
        fs::remove_file(hook)?;
        moves(&scene)
    })
}

#[test]
fn no_free_port() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let two = lab.host(2);
        let scene = Scene::start(lab, lab.host(1), usual("no-port"), 1)?;
        for options in [&[][..], &["--p2p"]] {
            let taken = PortsTaken::all(two)?;
            let words = ["host2", "no free TCP port", "49152-49215", "virt-ferry.toml"];
            refused(&scene, options, &words).with_context(|| format!("{options:?}"))?;
            // Ports that somebody listens on would be leftovers.
            taken.release(two)?;
            scene.is_unharmed(lab.host(1))?;
        }
        moves(&scene)
    })
}

/// Replaces the value of an attribute in a cookie, whatever it is.
fn change<'a>(element: &'a str, name: &'a str, value: &'a str) -> impl FnOnce(&str) -> String + 'a {
    move |cookie| {
        let mark = format!(" {name}='");
        let found = cookie.split_once(element).and_then(|(before, rest)| {
            let (head, rest) = rest.split_once(&mark)?;
            let (_, after) = rest.split_once('\'')?;
            Some(format!("{before}{element}{head}{mark}{value}'{after}"))
        });
        found.unwrap_or_else(|| panic!("no {element} with {name} in {cookie}"))
    }
}

fn unchanged(cookie: &str) -> String {
    cookie.to_owned()
}

#[test]
fn cookies_that_are_not_right() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("cookies"), 1)?;
        let stranger = BASE64_STANDARD.encode(Identity::generate(Uuid::new_v4())?.certificate());
        const OTHER: &str = "11111111-2222-4333-8444-555555555555";

        let offers: [(&str, &str, &[&str]); 7] = [
            ("token", "0", &["host2", "token"]),
            ("session", "x", &["host2", "session"]),
            ("certificate", "%", &["host2", "certificate"]),
            ("encryption", "maybe", &["host2", "encryption"]),
            // Well formed, but not what the source's engine has.
            (
                "token",
                &"0".repeat(64),
                &["host1", "192.168.77.12", "token is wrong"],
            ),
            ("session", OTHER, &["host1", "another migration"]),
            (
                "certificate",
                &stranger,
                &["host1", "192.168.77.12", "certificate"],
            ),
        ];
        for (name, value, words) in offers {
            let mut client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
            let left = client.migrate(change("<ferry:offer", name, value), unchanged)?;
            drop(client);
            judge(&scene, left, words).with_context(|| format!("offer with {name}={value}"))?;
        }
        let answers: [(&str, &str, &[&str]); 7] = [
            ("version", "9", &["host1", "version 9"]),
            ("port", "0", &["host1", "port"]),
            ("certificate", "%", &["host1", "certificate"]),
            ("session", OTHER, &["host1", "another migration"]),
            ("port", "1", &["host1", "192.168.77.12:1"]),
            ("host", "nowhere.invalid", &["host1", "nowhere.invalid"]),
            (
                "certificate",
                &stranger,
                &["host1", "192.168.77.12", "certificate"],
            ),
        ];
        for (name, value, words) in answers {
            let mut client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
            let left = client.migrate(unchanged, change("<ferry:answer", name, value))?;
            drop(client);
            judge(&scene, left, words).with_context(|| format!("answer with {name}={value}"))?;
        }

        // A version that this release does not know is libvirt's own to move.
        let mut client = Phases::new(&scene, one, two, LIVE | PROTECTED)?;
        let left = client.migrate(change("<ferry:offer", "version", "9"), unchanged)?;
        ensure!(left.is_ok(), "{left:?}");
        drop(client);
        scene.lives_on(two)?;
        ensure!(
            said(two, "speaks version 9") == 1,
            "the destination's log does not say why"
        );
        scene.move_to(two, one, &[])?;
        moves(&scene)
    })
}

fn judge(scene: &Scene, left: Result<(), String>, words: &[&str]) -> Result<()> {
    let Err(error) = left else {
        bail!("the guest moved, though it should not")
    };
    println!("{error}");
    names(&format!("error: {error}"), words)?;
    scene.is_unharmed(scene.lab.host(1))
}
