//! What has happened and who must hear of it: the one place where the threads of a migration meet.
//!
//! The plug-in's requests, QEMU's events and anybody's failure come in; whoever waits for one of them wakes. The
//! first [`End`] wins and breaks every connection of the session, so that no thread stays blocked on the network; and
//! it takes this process out of the guest's cgroups, with which libvirt may end it before the other engine has heard.

use super::pace::Pace;
use super::Error;
use crate::qemu::cgroup::Membership;
use crate::wire::{Breaker, Stopper};
use ferry_contract::control::Request;
use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How long an engine whose migration has ended waits to be asked about it: libvirt's phases return soon then. The
/// destination's libvirt never asks when its client goes away: it just ends the incoming QEMU.
const UNASKED: Duration = Duration::from_secs(60);
/// Requests that may wait; the plug-in sends one at a time.
const MAX_REQUESTS: usize = 16;

/// Why a migration ends before its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The operator gave it up.
    Cancelled,
    /// The plug-in let go: the daemon ended, or has no use for the session any more.
    Abandoned,
    /// Something failed, in these words.
    Failed(String),
    /// A connection to the other engine failed, in these words; the other engine may know better why.
    Lost(String),
}

/// When QEMU did what, as seen here.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// MIGRATION setup or active: QEMU's own part has begun.
    pub migrating: bool,
    /// STOP: the vCPUs stand still.
    pub stopped: Option<Instant>,
    /// MIGRATION pre-switchover: block I/O is drained too.
    pub drained: Option<Instant>,
    /// MIGRATION device: libvirt has let it go on.
    pub switched: Option<Instant>,
    /// It writes device state: nothing of it changes guest memory until all of that is written.
    pub frozen: bool,
    /// MIGRATION completed.
    pub completed: Option<Instant>,
    /// RESUME: the guest runs.
    pub resumed: Option<Instant>,
    /// MIGRATION failed or cancelled.
    pub failed: bool,
    /// It has closed its monitor: it has ended, as a rule.
    pub gone: bool,
}

#[derive(Default)]
struct State {
    requests: VecDeque<Request>,
    seen: Seen,
    mirrors: bool,
    copied: bool,
    committed: Option<Instant>,
    end: Option<End>,
    ended: Option<Instant>,
    abandoned: bool,
    connections: Vec<Breaker>,
    sockets: Vec<UnixStream>,
    listener: Option<Stopper>,
    listening: Option<Breaker>,
    membership: Option<Arc<Membership>>,
}

/// The meeting place.
#[derive(Default)]
pub struct Signals {
    /// The bandwidth the operator allows, at this moment.
    pub pace: Pace,
    state: Mutex<State>,
    changed: Condvar,
}

impl Signals {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is a whole value; a panicking thread leaves nothing half done.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The plug-in asks.
    pub fn request(&self, request: Request) {
        let mut state = self.lock();
        if state.requests.len() < MAX_REQUESTS {
            state.requests.push_back(request);
        }
        self.changed.notify_all();
    }

    /// QEMU did something.
    pub fn saw(&self, note: impl FnOnce(&mut Seen)) {
        let mut state = self.lock();
        note(&mut state.seen);
        let seen = state.seen;
        drop(state);
        if seen.drained.is_some() || seen.migrating && seen.stopped.is_some() {
            self.pace.lift();
        }
        self.changed.notify_all();
    }

    /// What QEMU has done so far.
    pub fn seen(&self) -> Seen {
        self.lock().seen
    }

    /// Whether QEMU answers nobody: its guest stands still, and its device state is withheld for the last of the memory.
    pub fn is_silent(&self) -> bool {
        self.lock().is_silent()
    }

    /// Waits so long for it to be silent, or not to be any more; says whether it is.
    pub fn wait_for_silence(&self, silent: bool, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if state.is_silent() == silent || left.is_zero() {
                return state.is_silent();
            }
            state = self.sleep(state, Some(left));
        }
    }

    /// libvirt ends its copies of disks before it lets QEMU go on, and tells of them until then.
    pub fn expect_mirrors(&self) {
        self.lock().mirrors = true;
    }

    /// The last of the memory has been read here: QEMU's device state may be.
    pub fn copied(&self) {
        self.lock().copied = true;
        self.changed.notify_all();
    }

    /// Whether it has.
    pub fn is_copied(&self) -> bool {
        self.lock().copied
    }

    /// Waits for that.
    pub fn wait_until_copied(&self) -> Result<(), Error> {
        self.wait(None, |state| state.copied.then_some(())).map(|_| ())
    }

    /// The destination holds all of the memory: device state may pass.
    pub fn commit(&self) {
        self.lock().committed.get_or_insert_with(Instant::now);
        tracing::debug!("the destination holds all of the guest's memory");
        self.changed.notify_all();
    }

    /// When that was.
    pub fn committed(&self) -> Option<Instant> {
        self.lock().committed
    }

    /// Ends the migration; the first cause stands.
    pub fn end(&self, end: End) {
        let mut state = self.lock();
        state.abandoned |= end == End::Abandoned;
        // After the commitment only QEMU can still cancel, which libvirt has told it: its stream must not be torn.
        let too_late = end == End::Cancelled && state.committed.is_some();
        if state.end.is_none() && !too_late {
            tracing::debug!(?end, "the session ends");
            state.end = Some(end);
            state.ended = Some(Instant::now());
            state.break_off();
        }
        let over = state.end.is_some();
        drop(state);
        self.changed.notify_all();
        if over {
            self.leave_cgroups();
        }
    }

    /// Fails where the migration has ended.
    pub fn check(&self) -> Result<(), Error> {
        self.lock().check()
    }

    /// The cause behind an error: that this side broke a connection off tells nothing, what ended the migration does; nor
    /// does a QEMU that has failed because its stream was cut, or because it was told to cancel.
    pub fn cause(&self, error: Error) -> Error {
        match error {
            Error::Libvirt if self.is_cancelled() => Error::Cancelled,
            Error::Wire(crate::wire::Error::BrokenOff { .. }) => self.check().err().unwrap_or(error),
            error => error,
        }
    }

    /// A connection to be broken at the end.
    pub fn watch(&self, breaker: Breaker) {
        let mut state = self.lock();
        state.connections.push(breaker);
        state.break_off_if_ended();
    }

    fn is_cancelled(&self) -> bool {
        self.lock().end == Some(End::Cancelled)
    }

    /// Whether it was the other engine that this one lost first.
    pub fn is_lost(&self) -> bool {
        matches!(self.lock().end, Some(End::Lost(_)))
    }

    /// The control connection of the destination, which listens for what the source asks next. An end before the
    /// commitment ends the listening; what ended it is still told.
    pub fn watch_control(&self, breaker: Breaker) {
        let mut state = self.lock();
        state.listening = Some(breaker);
        state.break_off_if_ended();
    }

    /// A socket of QEMU's stream to be shut at the end.
    pub fn watch_socket(&self, socket: &UnixStream) -> std::io::Result<()> {
        let socket = socket.try_clone()?;
        let mut state = self.lock();
        state.sockets.push(socket);
        state.break_off_if_ended();
        Ok(())
    }

    /// A listener to be stopped at the end.
    pub fn watch_listener(&self, stopper: Stopper) {
        let mut state = self.lock();
        state.listener = Some(stopper);
        state.break_off_if_ended();
    }

    /// This process is in the guest's cgroups, until the migration ends or [`leave_cgroups`](Self::leave_cgroups).
    pub fn is_member(&self, membership: Membership) {
        let mut state = self.lock();
        state.membership = Some(Arc::new(membership));
        let over = state.end.is_some();
        drop(state);
        if over {
            self.leave_cgroups();
        }
    }

    /// Leaves the guest's cgroups; says whether a signal that comes now may be the groups': it was in them within the last
    /// 10 s. Whoever has to be out of them before going on asks, too: it waits for a thread that is at it.
    pub fn leave_cgroups(&self) -> bool {
        // Not under the lock: it takes a while.
        let membership = self.lock().membership.clone();
        membership.is_some_and(|membership| membership.leave())
    }

    /// Whether nobody will ask any more: the plug-in has let go, or has said nothing for some time after the end.
    pub fn is_let_go(&self) -> bool {
        let state = self.lock();
        state.abandoned || state.ended.is_some_and(|ended| ended.elapsed() >= UNASKED)
    }

    /// Waits for the plug-in's next request, also in a migration that has failed: the plug-in will ask and must be
    /// told. `None` when the plug-in has let go, at the deadline, or some time after the end.
    pub fn next_request(&self, deadline: Option<Instant>) -> Option<Request> {
        let mut state = self.lock();
        loop {
            if let Some(request) = state.requests.pop_front() {
                return Some(request);
            }
            let forgotten = state.ended.map(|ended| ended + UNASKED);
            let end = [deadline, forgotten].into_iter().flatten().min();
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if state.abandoned || left.is_some_and(|left| left.is_zero()) {
                return None;
            }
            state = self.sleep(state, left);
        }
    }

    /// As [`next_request`](Self::next_request) without a deadline, but a migration that is over for good is an error at
    /// once, for nobody may ask about it any more: one that ends before its commitment, or whose QEMU has gone. One whose
    /// source is lost after its commitment is libvirt's to judge.
    pub fn next_request_or_failure(&self) -> Result<Option<Request>, Error> {
        let mut state = self.lock();
        while state.requests.is_empty() && !state.abandoned {
            if state.committed.is_none() || state.seen.gone {
                state.check()?;
            } else if state.end.is_some() {
                break;
            }
            state = self.sleep(state, None);
        }
        drop(state);
        Ok(self.next_request(None))
    }

    /// Waits until QEMU has done what `which` looks for, or the plug-in asks something (which is left in place),
    /// or the deadline passes; says whether QEMU has done it.
    pub fn wait_for_qemu(
        &self,
        deadline: Instant,
        which: impl Fn(&Seen) -> bool,
    ) -> Result<Option<bool>, Error> {
        self.wait(Some(deadline), |state| {
            match (which(&state.seen), state.requests.is_empty()) {
                (true, _) => Some(true),
                (false, false) => Some(false),
                (false, true) => None,
            }
        })
    }

    /// Waits for the commitment.
    pub fn wait_for_commitment(&self) -> Result<(), Error> {
        self.wait(None, |state| state.committed.map(|_| ())).map(|_| ())
    }

    /// Waits for whatever `ready` finds; `None` at the deadline. An ended migration is an error, but what is
    /// ready already is given out first.
    fn wait<T>(
        &self,
        deadline: Option<Instant>,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let mut state = self.lock();
        loop {
            if let Some(found) = ready(&mut state) {
                return Ok(Some(found));
            }
            state.check()?;
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            state = self.sleep(state, left);
        }
    }

    fn sleep<'a>(&self, state: MutexGuard<'a, State>, left: Option<Duration>) -> MutexGuard<'a, State> {
        match left {
            None => self.changed.wait(state).unwrap_or_else(|e| e.into_inner()),
            Some(left) => {
                self.changed
                    .wait_timeout(state, left)
                    .unwrap_or_else(|e| e.into_inner())
                    .0
            }
        }
    }
}

impl State {
    /// From when libvirt may let it go on: who asks when it has might be answered no more.
    fn is_silent(&self) -> bool {
        let may_go_on = match self.mirrors {
            true => self.seen.switched,
            false => self.seen.drained,
        };
        may_go_on.is_some() && !self.copied && !self.seen.failed && self.end.is_none()
    }

    fn check(&self) -> Result<(), Error> {
        match &self.end {
            None => Ok(()),
            Some(End::Cancelled) => Err(Error::Cancelled),
            Some(End::Abandoned) => Err(Error::Abandoned),
            Some(End::Failed(cause) | End::Lost(cause)) => Err(Error::Elsewhere(cause.clone())),
        }
    }

    fn break_off_if_ended(&mut self) {
        if self.end.is_some() {
            self.break_off();
        }
    }

    fn break_off(&mut self) {
        self.connections
            .drain(..)
            .for_each(|connection| connection.break_off());
        for socket in self.sockets.drain(..) {
            // One that is closed already needs no shutting.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        if let Some(listener) = self.listener.take() {
            listener.stop();
        }
        if let (Some(control), None) = (self.listening.take(), self.committed) {
            control.stop_reading();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_stands_and_wakes() {
        let signals = std::sync::Arc::new(Signals::default());
        let waiting = std::sync::Arc::clone(&signals);
        let waiter = std::thread::spawn(move || waiting.wait_for_commitment());
        signals.end(End::Cancelled);
        signals.end(End::Failed("later".into()));
        assert!(matches!(waiter.join().unwrap(), Err(Error::Cancelled)));
    }

    #[test]
    fn a_cancellation_after_the_commitment_is_qemus_affair() {
        let signals = Signals::default();
        signals.commit();
        signals.end(End::Cancelled);
        assert!(signals.check().is_ok());
        signals.end(End::Failed("why".into()));
        assert!(signals.check().is_err());
    }

    #[test]
    fn a_connection_broken_off_is_no_cause() {
        let broken = || {
            Error::Wire(crate::wire::Error::BrokenOff {
                peer: "192.0.2.1:49152".parse().unwrap(),
                doing: "sending",
            })
        };
        let signals = Signals::default();
        assert!(matches!(signals.cause(broken()), Error::Wire(_)));
        signals.end(End::Cancelled);
        assert!(matches!(signals.cause(broken()), Error::Cancelled));
        assert!(matches!(signals.cause(Error::Libvirt), Error::Cancelled));
        let signals = Signals::default();
        signals.end(End::Failed("why".into()));
        assert!(matches!(signals.cause(Error::Libvirt), Error::Libvirt));
    }

    #[test]
    fn a_failed_migration_still_hears_its_plug_in() {
        let signals = Signals::default();
        signals.end(End::Failed("why".into()));
        signals.request(Request::Finish);
        assert_eq!(signals.next_request(None), Some(Request::Finish));
        signals.end(End::Abandoned);
        assert_eq!(signals.next_request(None), None);
        assert!(matches!(signals.check(), Err(Error::Elsewhere(_))));
    }

    #[test]
    fn a_committed_guest_whose_qemu_has_gone_is_not_waited_for() {
        let signals = Signals::default();
        signals.commit();
        signals.saw(|seen| seen.gone = true);
        signals.end(End::Failed("QEMU has gone".into()));
        assert!(matches!(
            signals.next_request_or_failure(),
            Err(Error::Elsewhere(_))
        ));
        // One whose source has gone may still be resumed.
        let signals = Signals::default();
        signals.commit();
        signals.end(End::Lost("the source has gone".into()));
        signals.request(Request::Finish);
        assert_eq!(signals.next_request_or_failure().unwrap(), Some(Request::Finish));
    }

    #[test]
    fn qemu_is_silent_from_its_drain_until_the_memory_has_been_read() {
        let signals = Signals::default();
        let drained = |seen: &mut Seen| seen.drained = Some(Instant::now());
        assert!(!signals.wait_for_silence(true, Duration::from_millis(1)));
        signals.saw(drained);
        assert!(signals.wait_for_silence(true, Duration::from_secs(60)));
        signals.copied();
        assert!(!signals.is_silent());
        // Its stream has been cut.
        let signals = Signals::default();
        signals.saw(drained);
        signals.end(End::Cancelled);
        assert!(!signals.is_silent());
        // libvirt still tells of its disks.
        let signals = Signals::default();
        signals.expect_mirrors();
        signals.saw(drained);
        assert!(!signals.is_silent());
        signals.saw(|seen| seen.switched = Some(Instant::now()));
        assert!(signals.is_silent());
    }

    #[test]
    fn waiting_for_qemu_yields_to_the_plug_in() {
        let signals = Signals::default();
        let soon = || Instant::now() + Duration::from_millis(1);
        let stopped = |seen: &Seen| seen.stopped.is_some();
        assert_eq!(signals.wait_for_qemu(soon(), stopped).unwrap(), None);
        signals.request(Request::Performed { success: false });
        assert_eq!(signals.wait_for_qemu(soon(), stopped).unwrap(), Some(false));
        signals.saw(|seen| seen.stopped = Some(Instant::now()));
        assert_eq!(signals.wait_for_qemu(soon(), stopped).unwrap(), Some(true));
    }

    #[test]
    fn a_socket_watched_too_late_is_shut_at_once() {
        use std::io::Read;
        let signals = Signals::default();
        signals.end(End::Abandoned);
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        signals.watch_socket(&theirs).unwrap();
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
    }
}
