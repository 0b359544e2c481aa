//! A guest that is shut off, between two hosts, one of which or both die.

use super::await_that;
use super::cold::{recovered, Engine, Scene};
use super::files::sha256;
use ferry_contract::cold::journal::{Role, State};
use ferry_contract::cold::{Recovered, Wish};
use ferry_contract::control::{Reply, Request};
use nix::sys::signal::Signal;
use std::path::PathBuf;

/// A guest of one disk, and which of the hosts have it registered.
pub struct Guest {
    pub scene: Scene,
    pub disk: PathBuf,
    pub digest: String,
    pub at_source: bool,
    pub at_destination: bool,
}

impl Guest {
    pub fn new() -> Self {
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

    pub fn there(&self) -> PathBuf {
        self.scene.destination().join("disk.raw")
    }

    /// Who may start it now, as the hook decides.
    pub fn owners(&self) -> (bool, bool) {
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
    pub fn check(&self) {
        let owners = self.owners();
        assert_ne!(owners, (true, true), "both may start it");
        let complete = |path: &PathBuf| path.exists() && sha256(path) == self.digest;
        assert!(complete(&self.disk) || complete(&self.there()), "nobody has it");
    }

    /// libvirt registers it at the destination.
    pub fn define(&mut self) {
        self.check();
        assert_eq!(sha256(&self.there()), self.digest);
        self.at_destination = true;
        self.check();
    }

    /// The source's plug-in has heard that it has left.
    pub fn leave(&mut self, source: &mut Engine) {
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
    pub fn assert_moved(&self) {
        assert_eq!(self.owners(), (false, true));
        assert!(!self.disk.exists());
        assert_eq!(sha256(&self.there()), self.digest);
        self.scene.assert_clean();
    }

    /// It is where it was, nothing is left, and it can be moved now.
    pub fn assert_stays_and_moves_again(mut self) {
        assert_eq!(self.owners(), (true, false));
        assert_eq!(sha256(&self.disk), self.digest);
        let (source, destination) = self.scene.pulled();
        self.finish(source, destination);
        self.assert_moved();
    }

    /// Finish and Confirm.
    pub fn finish(&mut self, source: Engine, mut destination: Engine) {
        self.check();
        assert_eq!(destination.ask(&Request::ColdCommit), Reply::ColdPlaced);
        self.define();
        destination.own();
        self.check();
        self.is_confirmed(source);
        destination.end();
    }

    /// A recovery at the destination registers it.
    pub fn arrives(&mut self, there: &mut Engine) {
        assert_eq!(recovered(there), Recovered::Define);
        self.define();
        there.own();
    }

    /// A recovery at the source hears that it has left.
    pub fn leaves(&mut self, mut here: Engine) {
        assert_eq!(recovered(&mut here), Recovered::Leaves);
        self.leave(&mut here);
        here.end();
    }

    /// The source's session does.
    pub fn is_confirmed(&mut self, mut source: Engine) {
        assert_eq!(source.ask(&Request::ColdConfirm), Reply::ColdOwnedThere);
        self.leave(&mut source);
        source.end();
    }

    /// Nothing is left, at either host, but the guest where it was.
    pub fn assert_undone(self) {
        self.scene.assert_not_there();
        self.scene.assert_clean();
        self.assert_stays_and_moves_again();
    }

    /// Both engines, the source's stopped and the destination's asking it to let go.
    pub fn committing(&self) -> (Engine, Engine) {
        let (source, mut destination) = self.scene.pulled();
        source.signal(Signal::SIGSTOP);
        destination.tell(&Request::ColdCommit);
        self.scene.await_state(Role::Destination, State::Committing);
        await_that("the source to be asked", || self.scene.is_asked());
        assert_eq!(self.owners(), (false, false));
        (source, destination)
    }

    /// Why a recovery is refused.
    pub fn refused(&self, role: Role, wish: Wish) -> String {
        self.scene.recovery(role, wish).failure().cause
    }

    /// The operator says that the other host is lost: nobody is asked.
    pub fn owned(&self, role: Role, found: Recovered) -> Engine {
        let mut engine = self.scene.recovery(role, Wish::Own);
        assert_eq!(recovered(&mut engine), found);
        engine
    }

    /// The source is lost, as if it had burnt down, and the operator takes what has come for the guest.
    pub fn is_taken(&mut self) {
        let mut there = self.scene.recovery(Role::Destination, Wish::Own);
        self.at_source = false;
        self.arrives(&mut there);
        there.end();
        assert_eq!(self.owners(), (false, true));
        assert!(self.scene.journal(Role::Destination).is_none());
    }

    /// Whether all of it has come to the destination: under its own name or not yet.
    pub fn has_come(&self) -> bool {
        let journal = self.scene.journal(Role::Destination).unwrap();
        let entry = &journal.entries[0];
        let came = [Some(&entry.path), entry.temporary.as_ref()];
        let came = came.into_iter().flatten().find(|path| path.exists());
        journal.fence().is_some() && came.is_some_and(|path| sha256(path) == self.digest)
    }
}
