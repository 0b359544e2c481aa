//! An image whose backing file has another name now: its header is told, by QEMU's own tool.

use super::Error;
use ferry_contract::cold::storage::Rename;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// For qemu-img, which writes one header.
const LIMIT: Duration = Duration::from_secs(60);

/// Has the image's header name its backing file as it is called now, durably. The backing file itself is not looked at, nor
/// anything else in the image changed.
///
/// # Errors
/// What qemu-img says.
pub fn rename(rename: &Rename) -> Result<(), Error> {
    let failed = |why: &dyn std::fmt::Display| {
        let (image, backing) = (rename.image.display(), &rename.backing);
        Error::Other(format!(
            "{image} cannot be made to name its backing file {backing}: {why}"
        ))
    };
    let spawned = Command::new("qemu-img")
        .args(["rebase", "-q", "-u", "-f", &rename.format])
        .args(["-F", &rename.backing_format, "-b", &rename.backing])
        // An option it is not.
        .arg("--")
        .arg(&rename.image)
        // To QEMU the name of a data file is relative to where it runs, to libvirt to the image: here both are one.
        .current_dir(rename.image.parent().unwrap_or(Path::new("/")))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|error| failed(&format!("qemu-img: {error}")))?;
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                // One that the storage holds up cannot be waited for either.
                let _ = child.kill();
                return Err(failed(&format!(
                    "qemu-img has not ended within {} s",
                    LIMIT.as_secs()
                )));
            }
        }
    };
    if !status.success() {
        let mut said = String::new();
        let _ = child
            .stderr
            .map(|stderr| stderr.take(4096).read_to_string(&mut said));
        return Err(failed(&said.trim()));
    }
    let synced = File::open(&rename.image).and_then(|image| image.sync_all());
    synced.map_err(Error::file("sync", &rename.image))
}
