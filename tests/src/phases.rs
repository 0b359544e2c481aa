//! A libvirt client that runs a migration's phases one by one, with cookies that the test has had in its hands.
//!
//! The work is done by `tests/lib/phases.py` on the source, which says why.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Value};

use crate::host::Host;
use crate::lab::Lab;
use crate::scene::Scene;

/// VIR_MIGRATE_PEER2PEER.
pub const PEER_TO_PEER: u32 = 1 << 1;
/// VIR_MIGRATE_LIVE.
pub const LIVE: u32 = 1 << 0;
/// `--offline --persistent --undefinesource --copy-storage-all`: VIR_MIGRATE_OFFLINE, _PERSIST_DEST, _UNDEFINE_SOURCE and
/// _NON_SHARED_DISK.
pub const COLD: u32 = 1 << 10 | 1 << 3 | 1 << 4 | 1 << 6;
/// VIR_MIGRATE_CHANGE_PROTECTION: the guest keeps a job from Begin to Confirm, as virsh asks for it.
pub const PROTECTED: u32 = 1 << 8;

/// The client, on the guest's host.
pub struct Phases<'a> {
    domain: String,
    to: &'a Host,
    flags: u32,
    client: Child,
    asks: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

/// What a phase left: libvirt's refusals are part of the tests.
pub type Left<T> = Result<T, String>;

impl<'a> Phases<'a> {
    /// Starts the client on `from`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn new(scene: &Scene, from: &Host, to: &'a Host, flags: u32) -> Result<Self> {
        Self::of(scene.lab, scene.name(), from, to, flags)
    }

    /// The same for a guest that does not run.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn of(lab: &Lab, domain: &str, from: &Host, to: &'a Host, flags: u32) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("lib/phases.py");
        fs::copy(&script, lab.share().join("phases.py")).context("phases.py")?;
        let mut client = from
            .command("timeout")
            .args(["--kill-after=5", "300", "python3", "/lab/phases.py"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("phases.py")?;
        let asks = client.stdin.take();
        let answers = client.stdout.take().context("no pipe")?;
        Ok(Phases {
            domain: domain.to_owned(),
            to,
            flags,
            client,
            asks,
            answers: BufReader::new(answers),
        })
    }

    fn ask(&mut self, phase: &str, mut ask: Value) -> Result<Left<Value>> {
        ask["phase"] = phase.into();
        ask["host"] = self.to.uri().into();
        ask["domain"] = self.domain.as_str().into();
        ask["flags"] = self.flags.into();
        let mut asks = self.asks.as_ref().context("the client has ended")?;
        writeln!(asks, "{ask}").with_context(|| format!("cannot ask for {phase}"))?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(!line.is_empty(), "phases.py ended in {phase}; it said why above");
        let answer: Value = serde_json::from_str(&line).with_context(|| format!("phases.py said {line}"))?;
        Ok(match answer["error"].as_str() {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer),
        })
    }

    /// Begin: the guest's XML and the cookie.
    ///
    /// # Errors
    /// Only if the client fails.
    pub fn begin(&mut self) -> Result<(String, String)> {
        match self.ask("begin", json!({}))? {
            Ok(begun) => Ok((text(&begun, "xml")?, text(&begun, "cookie")?)),
            Err(error) => bail!("Begin: {error}"),
        }
    }

    /// Prepare: the cookie and the URI.
    ///
    /// # Errors
    /// Only if the client fails; so below.
    pub fn prepare(&mut self, xml: &str, cookie: &str) -> Result<Left<(String, String)>> {
        match self.ask("prepare", json!({ "xml": xml, "cookie": cookie }))? {
            Ok(prepared) => Ok(Ok((text(&prepared, "cookie")?, text(&prepared, "uri")?))),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Perform: the cookie.
    ///
    /// # Errors
    /// As above.
    pub fn perform(&mut self, uri: &str, cookie: &str) -> Result<Left<String>> {
        match self.ask("perform", json!({ "uri": uri, "cookie": cookie }))? {
            Ok(performed) => Ok(Ok(text(&performed, "cookie")?)),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Finish: ends the guest on the destination if `cancelled`, otherwise resumes it there.
    ///
    /// # Errors
    /// As above.
    pub fn finish(&mut self, cookie: Option<&str>, cancelled: bool) -> Result<Left<Option<String>>> {
        let finished = self.ask("finish", json!({ "cookie": cookie, "cancelled": cancelled }))?;
        Ok(finished.map(|finished| finished["cookie"].as_str().map(str::to_owned)))
    }

    /// Confirm: lets the guest run on here if `cancelled`, otherwise ends it.
    ///
    /// # Errors
    /// As above.
    pub fn confirm(&mut self, cookie: Option<&str>, cancelled: bool) -> Result<Left<()>> {
        let confirmed = self.ask("confirm", json!({ "cookie": cookie, "cancelled": cancelled }))?;
        Ok(confirmed.map(drop))
    }

    /// The whole of it peer-to-peer, by a client that keeps its connection.
    ///
    /// # Errors
    /// As above.
    pub fn peer_to_peer(&mut self) -> Result<Left<()>> {
        Ok(self.ask("p2p", json!({}))?.map(drop))
    }

    /// Looks the guest up, for a [`Self::save`] that goes by what it is now.
    ///
    /// # Errors
    /// If the guest is not known.
    pub fn look(&mut self) -> Result<()> {
        self.ask("look", json!({}))?.map(drop).map_err(anyhow::Error::msg)
    }

    /// Has the guest saved that was looked up.
    ///
    /// # Errors
    /// As above.
    pub fn save(&mut self, path: &str) -> Result<Left<()>> {
        Ok(self.ask("save", json!({ "path": path }))?.map(drop))
    }

    /// The whole of it by the function that clients had before libvirt 1.1, whose phases have no typed parameters.
    ///
    /// # Errors
    /// As above.
    pub fn migrate_as_of_old(&mut self) -> Result<Left<()>> {
        Ok(self.ask("migrate", json!({}))?.map(drop))
    }

    /// All phases as virsh runs them (libvirt 11.3, virDomainMigrateVersion3Full), with both hosts' cookies changed on their way.
    /// The first error.
    ///
    /// # Errors
    /// As above.
    pub fn migrate(
        &mut self,
        offer: impl FnOnce(&str) -> String,
        answer: impl FnOnce(&str) -> String,
    ) -> Result<Left<()>> {
        let (xml, cookie) = self.begin()?;
        let (cookie, uri) = match self.prepare(&xml, &offer(&cookie))? {
            Ok(prepared) => prepared,
            Err(error) => {
                let _ = self.confirm(None, true)?;
                return Ok(Err(error));
            }
        };
        let cookie = match self.perform(&uri, &answer(&cookie))? {
            Ok(cookie) => cookie,
            Err(error) => {
                let _ = self.finish(None, true)?;
                return Ok(Err(error));
            }
        };
        match self.finish(Some(&cookie), false)? {
            Ok(cookie) => self.confirm(cookie.as_deref(), false),
            Err(error) => {
                let _ = self.confirm(None, true)?;
                Ok(Err(error))
            }
        }
    }
}

impl Drop for Phases<'_> {
    fn drop(&mut self) {
        self.asks = None;
        // The end of its input ends it.
        let _ = self.client.wait();
    }
}

fn text(answer: &Value, name: &str) -> Result<String> {
    let text = answer[name].as_str();
    Ok(text.with_context(|| format!("no {name} in {answer}"))?.to_owned())
}
