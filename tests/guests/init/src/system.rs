//! What a guest keeps while it is shut off: a file system on its disk, and its TPM.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};

use ferry_guest::files::name_of;
use nix::mount::{mount, MsFlags};

use crate::disk::wait_for;

/// Where the file system is mounted.
const PLACE: &str = "/disk";
/// Bytes of the file that each start adds.
const ADDED: usize = 1 << 20;

/// Mounts the ext4 on this disk, compares each of its files with its name, and adds one for the next start to find. How many
/// there were.
pub fn check_files(disk: &str) -> Result<u64, String> {
    let device = wait_for(disk)?;
    let failed = |what: &dyn std::fmt::Display| format!("the file system on {device}: {what}");
    fs::create_dir(PLACE).map_err(|error| failed(&error))?;
    mount(
        Some(device.as_str()),
        PLACE,
        Some("ext4"),
        MsFlags::empty(),
        None::<&str>,
    )
    .map_err(|errno| failed(&errno))?;
    let mut read = 0;
    for entry in fs::read_dir(PLACE).map_err(|error| failed(&error))? {
        let path = entry.map_err(|error| failed(&error))?.path();
        if path.is_file() {
            let content = fs::read(&path).map_err(|error| failed(&error))?;
            let is = name_of(&content);
            if path.file_name().is_none_or(|name| name != is.as_str()) {
                return Err(failed(&format_args!("the content of {} is {is}", path.display())));
            }
            read += 1;
        }
    }
    add(read).map_err(|error| failed(&error))?;
    Ok(read)
}

/// On the disk when this returns, in its journal or its place.
fn add(number: u64) -> std::io::Result<()> {
    let content: Vec<u8> = (0..ADDED as u64)
        .map(|at| (at * (2 * number + 3)) as u8)
        .collect();
    let mut file = File::create(format!("{PLACE}/{}", name_of(&content)))?;
    file.write_all(&content)?;
    file.sync_all()?;
    File::open(PLACE)?.sync_all()
}

/// How often the TPM has been reset, which it keeps itself (TPM 2.0 Library, part 3, TPM2_ReadClock).
pub fn tpm_resets() -> Result<u32, String> {
    // Tag, length, command.
    const READ_CLOCK: [u8; 10] = [0x80, 1, 0, 0, 0, 10, 0, 0, 1, 0x81];
    // After tag, length and code: time and clock, 8 bytes each.
    const RESETS: usize = 10 + 8 + 8;
    let device = wait_for("tpm0")?;
    let failed = |what: &dyn std::fmt::Display| format!("{device}: {what}");
    let mut tpm = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&device)
        .map_err(|error| failed(&error))?;
    tpm.write_all(&READ_CLOCK).map_err(|error| failed(&error))?;
    let mut answer = [0; 64];
    let length = tpm.read(&mut answer).map_err(|error| failed(&error))?;
    let resets = answer[..length].get(RESETS..RESETS + 4);
    match (&answer[6..10], resets) {
        ([0, 0, 0, 0], Some(&[a, b, c, d])) => Ok(u32::from_be_bytes([a, b, c, d])),
        _ => Err(failed(&format_args!("it answers {:02x?}", &answer[..length]))),
    }
}
