//! Bytes from one thread to another, bounded by how many they are: what comes in small pieces is not less of it.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// A queue that takes a piece while fewer than `limit` bytes are in it.
pub fn queue<T: AsRef<[u8]>>(limit: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        limit,
        state: Mutex::new(State {
            pieces: VecDeque::new(),
            bytes: 0,
            ended: false,
        }),
        changed: Condvar::new(),
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

/// Puts pieces in; dropping it is their end.
pub struct Sender<T>(Arc<Shared<T>>);

/// Takes pieces out; once it is dropped none is taken any more.
pub struct Receiver<T>(Arc<Shared<T>>);

struct Shared<T> {
    limit: usize,
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    pieces: VecDeque<T>,
    bytes: usize,
    /// One of both ends is gone.
    ended: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // A piece and its bytes are counted in one step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, wanting: impl Fn(&State<T>) -> bool) -> MutexGuard<'_, State<T>> {
        let waited = self.changed.wait_while(self.lock(), |state| wanting(state));
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

impl<T: AsRef<[u8]>> Sender<T> {
    /// Waits for room; false where nobody takes it.
    pub fn send(&self, piece: T) -> bool {
        let mut state = self
            .0
            .wait_while(|state| state.bytes >= self.0.limit && !state.ended);
        if state.ended {
            return false;
        }
        state.bytes += piece.as_ref().len();
        state.pieces.push_back(piece);
        drop(state);
        self.0.changed.notify_all();
        true
    }
}

impl<T: AsRef<[u8]>> Receiver<T> {
    /// Waits for a piece; `None` after the last one.
    pub fn recv(&self) -> Option<T> {
        self.take(self.0.wait_while(|state| state.pieces.is_empty() && !state.ended))
    }

    /// A piece that is there.
    pub fn try_recv(&self) -> Option<T> {
        self.take(self.0.lock())
    }

    fn take(&self, mut state: MutexGuard<'_, State<T>>) -> Option<T> {
        let piece = state.pieces.pop_front()?;
        state.bytes -= piece.as_ref().len();
        drop(state);
        self.0.changed.notify_all();
        Some(piece)
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_counted_not_pieces() {
        let (sender, receiver) = queue::<Vec<u8>>(1000);
        // The last one may go beyond the limit, so that none is too long for it.
        assert!((0..999).all(|_| sender.send(vec![1])) && sender.send(vec![2; 5000]));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| sender.send(vec![3]));
            let taken: usize = (0..1000).map(|_| receiver.recv().unwrap().len()).sum();
            assert_eq!(taken, 5999);
            assert!(waiting.join().unwrap());
        });
        assert_eq!(receiver.recv(), Some(vec![3]));
        assert_eq!(receiver.try_recv(), None);
        drop(sender);
        assert_eq!(receiver.recv(), None);
    }

    #[test]
    fn what_is_in_it_outlives_the_sender_and_nobody_waits_for_a_receiver_that_is_gone() {
        let (sender, receiver) = queue::<Vec<u8>>(1);
        assert!(sender.send(vec![1, 2]));
        drop(sender);
        assert_eq!((receiver.recv(), receiver.recv()), (Some(vec![1, 2]), None));
        let (sender, receiver) = queue::<Vec<u8>>(1);
        assert!(sender.send(vec![1]));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| sender.send(vec![2]));
            drop(receiver);
            assert!(!waiting.join().unwrap());
        });
    }
}
