//! An image whose backing file gets another name: its header is told, by QEMU's own tool.

use super::Error;
use ferry_contract::cold::storage::Rename;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// For qemu-img, which writes one header.
const LIMIT: Duration = Duration::from_secs(60);

/// Has the image's header name its backing file by its new name, durably. The backing file itself is not looked at, nor
/// anything else in the image changed.
///
/// # Errors
/// What qemu-img says.
pub fn rename(rename: &Rename) -> Result<(), Error> {
    let failed = |why: String| {
        let (image, backing) = (rename.image.display(), &rename.backing);
        Error::Other(format!(
            "{image} cannot be made to name its backing file {backing}: {why}"
        ))
    };
    let mut rebase = Command::new("qemu-img");
    rebase
        .args(["rebase", "-q", "-u", "-f", &rename.format])
        .args(["-F", &rename.backing_format, "-b", &rename.backing])
        // An option it is not.
        .arg("--")
        .arg(&rename.image)
        // To QEMU the name of a data file is relative to where it runs, to libvirt to the image: here both are one.
        .current_dir(rename.image.parent().unwrap_or(Path::new("/")));
    ferry_host::run(&mut rebase, LIMIT).map_err(failed)?;
    let synced = File::open(&rename.image).and_then(|image| image.sync_all());
    synced.map_err(Error::file("sync", &rename.image))
}
