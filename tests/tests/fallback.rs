//! What virt-ferry does not take goes libvirt's own way, exactly as without it, and a log line says why.

use anyhow::{ensure, Context, Result};
use ferry_tests::guest::Backing;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options, Plugin};
use ferry_tests::scene::{said, usual, Scene};

/// What the plug-in's log line has in it, whatever the reason.
const OWN_WAY: &str = "libvirt's own migration";

/// One move that is not virt-ferry's, and the words in the source's log that say why.
fn moves_natively(scene: &Scene, from: &Host, to: &Host, options: &[&str], why: &str) -> Result<()> {
    let before = (said(from, OWN_WAY), said(from, why));
    scene.move_to(from, to, options)?;
    ensure!(
        said(from, OWN_WAY) > before.0 && said(from, why) > before.1,
        "{}'s log does not say '{OWN_WAY}: … {why}' of migrate {}",
        from.name(),
        options.join(" ")
    );
    Ok(())
}

fn nothing_of_ours(lab: &Lab) -> Result<()> {
    for number in [1, 2] {
        lab.host(number).assert_moved_away(0)?;
        lab.assert_clean(number)?;
    }
    Ok(())
}

/// The guest starts on host1 and goes there and back, managed and peer-to-peer; only `with` has the plug-in.
fn one_sided(plugin: Plugin, with: usize) -> Result<()> {
    Lab::with(Options::default().plugin(plugin), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("one-sided"), 1)?;
        for (options, why) in [
            (&[][..], "the destination did not answer"),
            (&["--p2p"], "the destination has no plug-in"),
        ] {
            for (from, to) in [(one, two), (two, one)] {
                if from.name() == lab.host(with).name() {
                    moves_natively(&scene, from, to, options, why)?;
                } else {
                    scene.move_to(from, to, options)?;
                }
            }
        }
        nothing_of_ours(lab)
    })
}

#[test]
fn plugin_on_the_source_only() -> Result<()> {
    one_sided(Plugin::Source, 1)
}

#[test]
fn plugin_on_the_destination_only() -> Result<()> {
    one_sided(Plugin::Destination, 2)
}

#[test]
fn guests_whose_memory_is_no_shared_file() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let kinds = [
            ("memfd", Backing::Memfd),
            ("anonymous", Backing::Anonymous),
            ("private", Backing::PrivateFile),
        ];
        for (number, (name, backing)) in (1..).zip(kinds) {
            let scene = Scene::start(lab, one, usual(name).backing(backing), number)?;
            let why = "pc.ram";
            moves_natively(&scene, one, two, &[], why).context(name)?;
            moves_natively(&scene, two, one, &["--p2p"], why).context(name)?;
            one.remove(name)?;
        }
        nothing_of_ours(lab)
    })
}

#[test]
fn options_that_are_not_taken() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("options"), 1)?;
        // Not --postcopy: QEMU's own needs vm.unprivileged_userfaultfd, which is off where it runs as libvirt's user.
        let cases: [(&[&str], &str); 3] = [
            (&["--p2p", "--tunnelled"], "tunnelled"),
            (&["--parallel", "--compressed", "--comp-methods", "zlib"], "zlib"),
            (&["--p2p", "--compressed", "--comp-methods", "xbzrle"], "xbzrle"),
        ];
        let mut places = [(one, two), (two, one)].into_iter().cycle();
        for (options, why) in cases {
            let (from, to) = places.next().context("cycle")?;
            moves_natively(&scene, from, to, options, why)?;
        }
        nothing_of_ours(lab)?;

        // None of it has left anything that keeps virt-ferry from the next move.
        scene.move_to(two, one, &[])?;
        two.assert_moved_away(1)
    })
}
