//! Managed migrations whose client has gone: whoever ran the phases died between two of them.
//!
//! libvirt then ends its job. Before its Perform it forgets the migration, and so do we. After it, the guest has been
//! handed over, stands still here, and libvirt leaves it so: "finished but we don't know if the domain was successfully
//! started on destination or not" (libvirt 11.3, `qemuMigrationAnyConnectionClosed`). We can know: the destination's
//! engine is asked, and the guest goes on here where it never ran there, and ends here where it does.

use crate::libvirt::{c_string, Domain, OwnedConnection};
use crate::live::source::conclude;
use crate::sessions::{self, Session};
use ferry_contract::control::Reply;
use ferry_host as host;
use std::ffi::CString;
use std::ops::ControlFlow;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Between two looks whether libvirt's job has ended without us.
const LOOK: Duration = Duration::from_secs(2);

/// Looks after a session of the source until it ends, on a thread of its own.
pub fn watch(session: &Arc<Session>, domain: Domain) {
    let Some(uri) = domain.connection().uri() else {
        return;
    };
    let uri = c_string(&uri);
    let watched = Arc::downgrade(session);
    let started = std::thread::Builder::new()
        .name("ferry-orphan".into())
        .spawn(move || while look(&watched, &uri).is_continue() {});
    if let Err(error) = started {
        tracing::warn!(
            guest = session.guest.name,
            "should this migration's client go, nobody will notice: {error}"
        );
    }
}

fn look(watched: &Weak<Session>, uri: &CString) -> ControlFlow<()> {
    std::thread::sleep(LOOK);
    let Some(session) = watched.upgrade().filter(sessions::is_listed) else {
        return ControlFlow::Break(());
    };
    // A connection of its own each time: the client's must be able to close, and the daemon to end.
    let Ok(connection) = OwnedConnection::here(uri) else {
        return ControlFlow::Continue(());
    };
    let domain = match connection.get().domain(session.guest.uuid) {
        Ok(domain) => domain,
        // The guest is gone, and the migration with it.
        Err(error) if error.is_no_domain() => {
            sessions::remove(&session);
            return ControlFlow::Break(());
        }
        Err(_) => return ControlFlow::Continue(()),
    };
    if domain.get().has_job() {
        return ControlFlow::Continue(());
    }
    // A Perform that fails and a Confirm end the job, too; and looks once more, as they may have begun and ended meanwhile.
    let claim = session.claim();
    if claim.is_none() || !sessions::is_listed(&session) {
        return ControlFlow::Continue(());
    }
    adopt(&session, domain.get());
    ControlFlow::Break(())
}

/// Ends what nobody else will.
fn adopt(session: &Arc<Session>, domain: Domain) {
    let guest = session.guest.name.as_str();
    if !session.is_handed_over() {
        tracing::warn!(guest, "the migration's client has gone: the guest stays");
        sessions::remove(session);
        return;
    }
    let (what, done) = match conclude(session, false) {
        Some(Reply::Concluded) => {
            tracing::warn!(guest, "the migration's client has gone, and the guest does not run at the destination: it goes on here");
            ("resume", domain.resume())
        }
        Some(Reply::RunsThere) => {
            tracing::warn!(
                guest,
                "the migration's client has gone, and the guest runs at the destination: it is ended here"
            );
            ("destroy", domain.destroy())
        }
        _ => {
            tracing::error!(
                guest,
                "the migration's client has gone, and the destination does not say whether the guest runs there, so it stays \
                 paused on host {}. Look at the destination. If the guest runs there, virsh destroy it here; if it does not, \
                 virsh resume it here",
                host::name()
            );
            ("", Ok(()))
        }
    };
    if let Err(error) = done {
        tracing::error!(
            guest,
            "virsh {what} of the guest on host {} failed: {error}; do it by hand",
            host::name()
        );
    }
    sessions::remove(session);
}
