//! Live migration through the engine, end to end: libvirtd, QEMU and a guest that checks its own memory.

use anyhow::{ensure, Result};
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::{said, usual, Scene};

/// What the source's engine says of a migration it completed.
const THROUGH_US: &str = "timeline kept";

#[test]
fn managed_there_and_back() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("managed"), 1)?;
        scene.lives_on(one)?;
        scene.move_to(one, two, &[])?;
        scene.move_to(two, one, &[])?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)?;
        ensure!(said(one, THROUGH_US) == 2, "the engine did not move the guest");
        Ok(())
    })
}

#[test]
fn peer_to_peer_there_and_back() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let scene = Scene::start(lab, one, usual("p2p"), 1)?;
        scene.move_to(one, two, &["--p2p"])?;
        scene.move_to(two, one, &["--p2p"])?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)?;
        ensure!(said(one, THROUGH_US) == 2, "the engine did not move the guest");
        Ok(())
    })
}
