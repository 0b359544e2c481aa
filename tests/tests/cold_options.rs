//! What an operator may ask of a cold migration besides `--copy-storage-all`, and what the configuration says.

use std::fs;

use anyhow::{ensure, Context, Result};
use ferry_tests::cold::{same_files, serial, Content, Guest, IMAGES};
use ferry_tests::fault::names;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::PATIENCE;
use ferry_tests::timeline::{Outcome, Role};
use ferry_tests::wait::wait_until;

#[test]
fn what_may_be_asked_for() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        some_disks_only(lab).context("--migrate-disks")?;
        files_are_kept(lab).context("cold.source_storage")?;
        at_a_set_rate(lab).context("--bandwidth")?;
        packed(lab).context("--compressed")?;
        with_its_checkpoints(lab).context("checkpoints")?;
        onto_a_base_that_is_not_there(lab).context("--copy-storage-inc")?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

fn path(name: &str) -> String {
    format!("{IMAGES}/{name}")
}

/// A disk that is not named stays, and must be at the destination, where nothing touches it.
fn some_disks_only(lab: &Lab) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    let (moves, stays) = (path("moves.img"), path("stays.img"));
    Content::sparse(8).write(one, &moves)?;
    Content::sparse(8).write(one, &stays)?;
    Guest::new("some")
        .disk("vda", "raw", &moves)
        .disk("vdb", "raw", &stays)
        .define(one)?;
    let digest = one.sha256(&moves)?;
    let before = two.guests_files()?;
    for (disk, words) in [
        ("vdz", &["no disk vdz", "host1"][..]),
        ("vda", &[stays.as_str(), "vdb", "host2"]),
    ] {
        let asked = ["--undefinesource", "--migrate-disks", disk];
        names(&one.begin_cold("some", two, &asked)?.fails()?, words)?;
        same_files(&before, &two.guests_files()?)?;
    }
    Content::sparse(8).write(two, &stays)?;
    let theirs = two.sha256(&stays)?;
    one.move_cold("some", two, &["--undefinesource", "--migrate-disks", "vda"])?;
    two.has_shut_off("some")?;
    ensure!(two.sha256(&moves)? == digest, "the disk is another");
    ensure!(two.sha256(&stays)? == theirs, "the other disk was written to");
    ensure!(
        !one.has(&moves) && one.has(&stays),
        "the source's disks are not as they should be"
    );
    two.boots(lab, "some")
}

/// The administrator wants the source's files to stay: the guest is the destination's all the same.
fn files_are_kept(lab: &Lab) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    let disk = path("kept.img");
    Content::sparse(8).write(one, &disk)?;
    Guest::new("kept").disk("vda", "raw", &disk).define(one)?;
    one.configure("[cold]\nsource_storage = \"keep\"\n")?;
    one.move_cold("kept", two, &["--undefinesource"])?;
    one.configure("")?;
    two.has_shut_off("kept")?;
    ensure!(one.state("kept")?.is_none(), "host1 still knows the guest");
    ensure!(
        one.sha256(&disk)? == two.sha256(&disk)?,
        "the disk is not as it was on both hosts"
    );
    Ok(())
}

/// Moves a guest whose only disk is this, and says what the source's record has of it.
fn moved(lab: &Lab, name: &str, disk: &str, options: &[&str]) -> Result<ferry_tests::timeline::ColdRecord> {
    let (one, two) = (lab.host(1), lab.host(2));
    Guest::new(name).disk("vda", "raw", disk).define(one)?;
    let digest = one.sha256(disk)?;
    one.move_cold(name, two, &[&["--undefinesource"], options].concat())?;
    two.has_shut_off(name)?;
    ensure!(two.sha256(disk)? == digest, "the disk is another");
    let record = one.last_cold_record(Role::Source)?;
    ensure!(record.outcome == Outcome::Completed, "{:?}", record.outcome);
    Ok(record)
}

/// No more than was allowed has been sent a second, whatever kept it from sending that much; what is asked about a guest
/// that runs is no obstacle.
fn at_a_set_rate(lab: &Lab) -> Result<()> {
    const MIB: u64 = 12;
    let disk = path("slow.img");
    Content::dense(32, 24).write(lab.host(1), &disk)?;
    for options in [&[][..], &["--p2p"]] {
        let limit = MIB.to_string();
        let asked = [
            "--bandwidth",
            &limit,
            "--abort-on-error",
            "--auto-converge",
            "--suspend",
        ];
        let record = moved(lab, "slow", &disk, &[&asked[..], options].concat())?;
        let seconds = record.spent_at("transfer") / 1000.0;
        let rate = record.wire_bytes as f64 / seconds / (1 << 20) as f64;
        ensure!(
            record.sent_bytes >= 24 << 20 && rate <= MIB as f64 * 1.25,
            "{} bytes in {seconds:.2} s: {rate:.1} MiB/s, {options:?}",
            record.wire_bytes
        );
        lab.host(2)
            .move_cold("slow", lab.host(1), &["--undefinesource"])?;
        lab.host(1).virsh(&["undefine", "slow"])?;
    }
    Ok(())
}

/// What packs well takes less of the network, and arrives as it was.
fn packed(lab: &Lab) -> Result<()> {
    let disk = path("text.img");
    let one = lab.host(1);
    one.run(&["sh", "-c", &format!("yes 'a line of text' | head -c 16M >{disk}")])?;
    let options = ["--compressed", "--comp-methods", "zstd", "--comp-zstd-level", "3"];
    let record = moved(lab, "text", &disk, &options)?;
    ensure!(
        record.sent_bytes == 16 << 20 && record.wire_bytes * 4 < record.sent_bytes,
        "{} bytes of {} on the wire",
        record.wire_bytes,
        record.sent_bytes
    );
    Ok(())
}

/// A checkpoint is a definition and a bitmap inside the image: both are of use at the destination.
fn with_its_checkpoints(lab: &Lab) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    let disk = path("checked.qcow2");
    one.run(&["qemu-img", "create", "-q", "-f", "qcow2", &disk, "16M"])?;
    Guest::new("checked").disk("vda", "qcow2", &disk).define(one)?;
    let log = lab.share().join("checked.serial");
    serial(&log)?;
    one.virsh(&["start", "checked"])?;
    one.virsh(&["checkpoint-create-as", "checked", "first", "--diskspec", "vda"])?;
    one.ends("checked")?;
    let bitmaps = |host: &Host| -> Result<bool> {
        let said = host.run(&["qemu-img", "info", "--output=json", &disk])?;
        let image: serde_json::Value = serde_json::from_str(&said)?;
        let bitmaps = &image["format-specific"]["data"]["bitmaps"];
        Ok(bitmaps[0]["name"] == "first")
    };
    ensure!(bitmaps(one)?, "the image has no bitmap");

    one.move_cold("checked", two, &["--undefinesource"])?;
    ensure!(one.state("checked")?.is_none(), "host1 still knows the guest");
    ensure!(
        two.virsh(&["checkpoint-list", "checked", "--name"])? == "first",
        "the checkpoint has not come along"
    );
    ensure!(bitmaps(two)?, "its bitmap has not come along");
    // QEMU and libvirt take it for what it is.
    serial(&log)?;
    two.virsh(&["start", "checked"])?;
    two.virsh(&["checkpoint-delete", "checked", "first"])?;
    two.ends("checked")?;
    ensure!(!bitmaps(two)?, "the bitmap outlives its checkpoint");
    Ok(())
}

/// Only what lies above a base that is there can be moved without it.
fn onto_a_base_that_is_not_there(lab: &Lab) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    let (base, top) = (path("base.raw"), path("top.qcow2"));
    Content::sparse(8).write(one, &base)?;
    one.run(&[
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top,
    ])?;
    Guest::new("above").disk("vda", "qcow2", &top).define(one)?;
    let files = [one.guests_files()?, two.guests_files()?];
    let inc = [
        "--offline",
        "--persistent",
        "--copy-storage-inc",
        "--undefinesource",
    ];
    for p2p in [&[][..], &["--p2p"]] {
        let said = one.underway("above", two, &inc, p2p)?.fails()?;
        names(
            &said,
            &[
                &base,
                "disk vda",
                "is not on this host",
                "--copy-storage-all",
                "host2",
            ],
        )?;
        for (host, files) in [one, two].into_iter().zip(&files) {
            // An engine that was told to end removes its marks.
            wait_until("the host to be as before", PATIENCE, || {
                Ok(same_files(files, &host.guests_files()?).is_ok())
            })
            .with_context(|| host.name().to_owned())?;
        }
    }
    // With the base there it goes.
    fs::copy(one.path(&base), two.path(&base))?;
    one.underway("above", two, &inc, &[])?.succeeds()?;
    two.has_shut_off("above")
}
