//! Commands to a guest over UDP; see `guests/README.md` for the words.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use ferry_guest::config::COMMAND_PORT;
use ferry_guest::line::{Status, Verdict, PREFIX};

/// When nothing is answered, the command is sent again: a datagram to a guest under way may be lost.
const AGAIN: Duration = Duration::from_secs(2);

/// A guest's command port.
#[derive(Debug)]
pub struct Remote {
    socket: UdpSocket,
    guest: SocketAddr,
}

impl Remote {
    /// Reaches the guest at `ip` from the network namespace `namespace`, or the caller's own.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    pub fn new(namespace: Option<&Path>, ip: Ipv4Addr) -> Result<Self> {
        let socket = super::netns::udp_socket(namespace, (Ipv4Addr::UNSPECIFIED, 0).into())?;
        socket
            .set_read_timeout(Some(AGAIN))
            .context("cannot set a time limit")?;
        Ok(Remote {
            socket,
            guest: (ip, COMMAND_PORT).into(),
        })
    }

    /// Sends one command and returns the first answer that `wanted` accepts, without the prefix of all lines.
    fn ask<T>(&self, command: &str, patience: Duration, wanted: impl Fn(&str) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + patience;
        let mut buffer = [0; 2048];
        while Instant::now() < deadline {
            // No route yet, or a neighbour not found: the next try may succeed.
            let _ = self.socket.send_to(command.as_bytes(), self.guest);
            // Answers to earlier tries may come first.
            loop {
                match self.socket.recv_from(&mut buffer) {
                    Ok((length, from)) if from == self.guest => {
                        let answer = String::from_utf8_lossy(&buffer[..length]);
                        if let Some(answer) = wanted(&answer) {
                            return Ok(answer);
                        }
                    }
                    Ok(_) => {}
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                        break
                    }
                    // ICMP: the guest is not there now.
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => break,
                    Err(error) => return Err(error).context("cannot receive"),
                }
            }
        }
        bail!(
            "the guest at {} did not answer '{command}' within {patience:?}",
            self.guest
        )
    }

    /// Has all memory checked now. `id` tells this answer from others.
    ///
    /// # Errors
    /// When `patience` is over.
    pub fn check(&self, id: &str, patience: Duration) -> Result<Verdict> {
        self.ask(&format!("check {id}"), patience, |answer| {
            Verdict::parse(answer).filter(|verdict| verdict.id == id)
        })
    }

    /// The guest's state now.
    ///
    /// # Errors
    /// When `patience` is over.
    pub fn status(&self, patience: Duration) -> Result<Status> {
        self.ask("status", patience, Status::parse)
    }

    /// Has the guest take so much memory, write to each page of it and free it, once for this `id`.
    ///
    /// # Errors
    /// When `patience` is over or the guest has not got so much.
    pub fn spend(&self, mib: u64, id: &str, patience: Duration) -> Result<()> {
        self.order(&format!("spend {mib} {id}"), patience)
    }

    /// Sends a command that is answered by ok: `rate`, `set`, `reset`, `quit`.
    ///
    /// # Errors
    /// When `patience` is over or the guest refuses.
    pub fn order(&self, command: &str, patience: Duration) -> Result<()> {
        let answer = self.ask(command, patience, |answer| {
            let answer = answer.trim_start_matches(PREFIX);
            (answer == "ok" || answer.starts_with("refused")).then(|| answer.to_owned())
        })?;
        ensure!(answer == "ok", "the guest at {} {answer}", self.guest);
        Ok(())
    }
}
