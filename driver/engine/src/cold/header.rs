//! An image whose backing file has another name now: its header is told, by QEMU's own tool.

use super::Error;
use ferry_contract::cold::storage::Rename;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

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
    let output = Command::new("qemu-img")
        .args(["rebase", "-q", "-u", "-f", &rename.format])
        .args(["-F", &rename.backing_format, "-b", &rename.backing])
        // An option it is not.
        .arg("--")
        .arg(&rename.image)
        // To QEMU the name of a data file is relative to where it runs, to libvirt to the image: here both are one.
        .current_dir(rename.image.parent().unwrap_or(Path::new("/")))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(&format!("qemu-img: {error}")))?;
    if !output.status.success() {
        return Err(failed(&String::from_utf8_lossy(&output.stderr).trim()));
    }
    let synced = File::open(&rename.image).and_then(|image| image.sync_all());
    synced.map_err(Error::file("sync", &rename.image))
}
