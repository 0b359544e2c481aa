//! virt-ferry.toml: what each host is told there is what happens.

use anyhow::{ensure, Result};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{said, usual, Scene};
use ferry_tests::timeline::{Role, Timeline};

const TLS: Option<&str> = Some("TLS 1.3");

/// What both ends recorded of the last move, once both have put it down.
fn both_ends(lab: &Lab, from: &Host, to: &Host) -> Result<[Timeline; 2]> {
    lab.assert_clean(1)?;
    lab.assert_clean(2)?;
    let ends = [
        from.last_timeline(Role::Source)?,
        to.last_timeline(Role::Destination)?,
    ];
    ensure!(
        ends[0].session == ends[1].session,
        "{} and {} kept timelines of different migrations",
        from.name(),
        to.name()
    );
    Ok(ends)
}

fn assert_encryption(ends: &[Timeline; 2], expected: Option<&str>) -> Result<()> {
    for end in ends {
        ensure!(
            end.encryption.as_deref() == expected,
            "the {:?} says encryption {:?}, not {expected:?}",
            end.role,
            end.encryption
        );
    }
    Ok(())
}

#[test]
fn streams_and_encryption() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("settings"), 1)?;

        scene.move_to(one, two, &[])?;
        let ends = both_ends(lab, one, two)?;
        assert_encryption(&ends, TLS)?;
        ensure!(ends.iter().all(|end| end.streams() == 1), "{ends:?}");

        // The source says how many streams.
        two.configure("streams = 4\n")?;
        scene.move_to(two, one, &["--p2p"])?;
        let ends = both_ends(lab, two, one)?;
        assert_encryption(&ends, TLS)?;
        ensure!(ends.iter().all(|end| end.streams() == 4), "{ends:?}");

        for host in [one, two] {
            host.configure("streams = 4\nencryption = \"never\"\n")?;
        }
        scene.move_to(one, two, &[])?;
        let ends = both_ends(lab, one, two)?;
        assert_encryption(&ends, None)?;
        ensure!(ends.iter().all(|end| end.streams() == 4), "{ends:?}");

        // One host that wants encryption is enough, whichever it is.
        one.configure("encryption = \"always\"\n")?;
        for (from, to) in [(two, one), (one, two)] {
            scene.move_to(from, to, &[])?;
            assert_encryption(&both_ends(lab, from, to)?, TLS)?;
        }
        one.assert_moved_away(3)?;
        two.assert_moved_away(2)
    })
}

#[test]
fn a_host_that_is_not_to_take_part_does_not() -> Result<()> {
    const MISSPELT: &str = "streems = 2\n";
    const DISABLED: &str = "enabled = false\n";
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("apart"), 1)?;
        // Each configuration on host1 once as the source and once as the destination, managed and peer-to-peer:
        // host1's log says why.
        for (toml, why) in [(MISSPELT, "streems"), (DISABLED, "disabled")] {
            one.configure(toml)?;
            for options in [&[][..], &["--p2p"]] {
                for (from, to) in [(one, two), (two, one)] {
                    let before = said(one, why);
                    scene.move_to(from, to, options)?;
                    ensure!(
                        said(one, why) > before,
                        "host1's log does not say why the guest left {} libvirt's own way {options:?}: no '{why}'",
                        from.name()
                    );
                }
            }
        }
        one.assert_moved_away(0)?;
        two.assert_moved_away(0)?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)?;

        // The configuration is read for each migration: no daemon need be restarted. But a QEMU that was started where
        // virt-ferry was disabled has no monitor for it, and waits for its next move.
        one.configure("")?;
        let monitor = "without the plug-in's monitor";
        scene.move_to(one, two, &[])?;
        ensure!(said(one, monitor) == 1, "host1's log does not say '{monitor}'");
        scene.move_to(two, one, &[])?;
        scene.move_to(one, two, &[])?;
        one.assert_moved_away(1)?;
        two.assert_moved_away(1)
    })
}
