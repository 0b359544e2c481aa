//! Guests that are shut off move with everything they own, and arrive byte for byte.

use std::fs;
use std::io::Read;

use anyhow::{ensure, Context, Result};
use ferry_guest::files::name_of;
use ferry_tests::cold::{same_files, serial, shell, Content, Guest, IMAGES};
use ferry_tests::fault::names;
use ferry_tests::guest::Config;
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::PATIENCE;
use ferry_tests::wait::wait_for;

/// The simplest guest: one sparse raw disk, there by libvirt's client, back by its daemon.
#[test]
fn a_guest_moves_with_its_disk_and_back() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let before = [one.guests_files()?, two.guests_files()?];
        let disk = format!("{IMAGES}/plain.img");
        Content::sparse(64).write(one, &disk)?;
        Guest::new("plain").disk("vda", "raw", &disk).define(one)?;
        let (digest, allocated) = (one.sha256(&disk)?, one.allocated(&disk)?);

        for (from, to, other, options) in [
            (one, two, &before[0], &["--undefinesource"][..]),
            (two, one, &before[1], &["--undefinesource", "--p2p"]),
        ] {
            from.move_cold("plain", to, options)?;
            to.has_shut_off("plain")?;
            ensure!(
                to.sha256(&disk)? == digest,
                "the disk is another on {}",
                to.name()
            );
            let taken = to.allocated(&disk)?;
            ensure!(
                taken * 100 <= allocated * 102,
                "{taken} bytes taken up, {allocated} before"
            );
            ensure!(
                from.state("plain")?.is_none(),
                "{} still knows the guest",
                from.name()
            );
            same_files(other, &from.guests_files()?).with_context(|| from.name().to_owned())?;
            to.boots(lab, "plain")?;
            lab.assert_clean(1)?;
            lab.assert_clean(2)?;
        }
        Ok(())
    })
}

/// The digests of these files.
fn digests(host: &Host, files: &[&str]) -> Result<Vec<String>> {
    files.iter().map(|file| host.sha256(file)).collect()
}

/// Layers that name each other, data beside its image, snapshots inside images, their metadata, autostart.
#[test]
fn chains_data_files_and_snapshots() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let before = [one.guests_files()?, two.guests_files()?];
        let [base, mid, top] =
            ["a/base.raw", "a/mid.qcow2", "top.qcow2"].map(|name| format!("{IMAGES}/{name}"));
        let [image, data] = ["data.qcow2", "d/data.raw"].map(|name| format!("{IMAGES}/{name}"));
        Content::sparse(64).write(one, &base)?;
        // Directories are the administrator's business.
        two.run(&["mkdir", &format!("{IMAGES}/a"), &format!("{IMAGES}/d")])?;
        shell(
            one,
            &format!(
                "cd {IMAGES}; mkdir d
                 qemu-img create -q -f qcow2 -b base.raw -F raw a/mid.qcow2
                 qemu-io -c 'write -P 7 20M 1M' -f qcow2 a/mid.qcow2
                 qemu-img create -q -f qcow2 -b {mid} -F qcow2 top.qcow2
                 qemu-io -c 'write -P 8 21M 1M' -f qcow2 top.qcow2
                 qemu-img create -q -f qcow2 -o data_file=d/data.raw,data_file_raw=on data.qcow2 16M
                 qemu-io -c 'write -P 9 3M 5M' -f qcow2 data.qcow2"
            ),
        )?;
        Guest::new("layers").disk("vda", "qcow2", &top).define(one)?;
        // libvirt takes snapshots of all disks or none, and QEMU none of one with a data file.
        Guest::new("data").disk("vda", "qcow2", &image).define(one)?;
        one.virsh(&["snapshot-create-as", "layers", "first"])?;
        shell(one, &format!("qemu-io -c 'write -P 10 22M 1M' -f qcow2 {top}"))?;
        one.virsh(&["snapshot-create-as", "layers", "second"])?;
        one.virsh(&["autostart", "layers"])?;
        let files = [&base, &mid, &top, &image, &data].map(String::as_str);
        let digest = digests(one, &files)?;

        for (from, to, other, options) in [
            (one, two, &before[0], &["--undefinesource", "--p2p"][..]),
            (two, one, &before[1], &["--undefinesource"]),
        ] {
            for guest in ["layers", "data"] {
                from.move_cold(guest, to, options)?;
                to.has_shut_off(guest)?;
            }
            ensure!(digests(to, &files)? == digest, "files differ on {}", to.name());
            let chain = to.run(&["qemu-img", "info", "--backing-chain", "-f", "qcow2", &top])?;
            ensure!(chain.matches("image: ").count() == 3, "{chain}");
            to.run(&["qemu-img", "check", "-q", "-f", "qcow2", &top])?;
            let snapshots = to.virsh(&["snapshot-list", "layers", "--name", "--topological"])?;
            let current = to.virsh(&["snapshot-current", "layers", "--name"])?;
            ensure!(
                snapshots.split_whitespace().eq(["first", "second"]) && current == "second",
                "{snapshots}, current {current}"
            );
            ensure!(
                to.virsh(&["dominfo", "layers"])?
                    .lines()
                    .any(|line| line.split_whitespace().eq(["Autostart:", "enable"])),
                "it does not start with {}",
                to.name()
            );
            same_files(other, &from.guests_files()?).with_context(|| from.name().to_owned())?;
        }
        // What libvirt was told is so: it can go back, and the guests run.
        one.virsh(&["snapshot-revert", "layers", "first"])?;
        let reverted = shell(one, &format!("qemu-io -c 'read -P 0 22M 1M' -f qcow2 {top}"))?;
        ensure!(!reverted.contains("verification failed"), "{reverted}");
        one.boots(lab, "layers")?;
        serial(&lab.share().join("data.serial"))?;
        one.virsh(&["start", "data"])?;
        one.ends("data")?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// A block device on each host, at one path: what a logical volume is to a guest. It ends with the lab.
fn device(host: &Host, mib: u64) -> Result<()> {
    // Held open, a loop device that is let go of is freed with its last holder.
    shell(
        host,
        &format!(
            "truncate -s {mib}M /run/volume
             device=$(losetup --find --show /run/volume)
             ln -s $device {DEVICE}
             exec 9<$device
             setsid sleep infinity <&9 >/dev/null 2>&1 &
             while ! losetup -d $device; do sleep 0.1; done"
        ),
    )
    .map(drop)
}

const DEVICE: &str = "/dev/ferry-volume";

/// A device that a guest has which does not run is not another's to write to, also where that one comes from a file.
fn is_not_written_to(lab: &Lab) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    let disk = format!("{IMAGES}/thief.img");
    Content::sparse(24).write(one, &disk)?;
    Guest::new("thief").disk("vda", "raw", &disk).define(one)?;
    Guest::new("owner").block("vda", DEVICE).define(two)?;
    let digest = two.sha256(DEVICE)?;
    let xml = one.virsh(&["dumpxml", "thief", "--migratable", "--inactive"])?;
    let onto = xml
        .replace("<disk type='file'", "<disk type='block'")
        .replace(&format!("file='{disk}'"), &format!("dev='{DEVICE}'"));
    fs::write(lab.share().join("thief.xml"), onto)?;
    let options = [
        "--undefinesource",
        "--xml",
        "/lab/thief.xml",
        "--persistent-xml",
        "/lab/thief.xml",
    ];
    let said = one.begin_cold("thief", two, &options)?.fails()?;
    names(&said, &[DEVICE, "belongs to another guest", "host2"])?;
    ensure!(two.sha256(DEVICE)? == digest, "the device was written to");
    one.virsh(&["undefine", "thief"])?;
    two.virsh(&["undefine", "owner"])?;
    one.run(&["rm", &disk]).map(drop)
}

/// Firmware's variables, TPM, a block device, a pool's volume, a CD; under another name, and one disk elsewhere.
#[test]
fn firmware_tpm_devices_and_pools() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let before = one.guests_files()?;
        for host in [one, two] {
            device(host, 24)?;
            shell(
                host,
                "mkdir -p /srv/pool; virsh pool-create-as pool dir --target /srv/pool",
            )?;
        }
        is_not_written_to(lab)?;
        fs::write(lab.share().join("cd.iso"), [1; 4096])?;
        let (plain, elsewhere) = (format!("{IMAGES}/full.img"), "/srv/elsewhere/full.img");
        let variables = "/var/lib/libvirt/qemu/nvram/full_VARS.fd";
        Content::sparse(32).write(one, &plain)?;
        Content::sparse(24).write(one, DEVICE)?;
        Content::sparse(16).write(one, "/srv/pool/volume.img")?;
        one.virsh(&["pool-refresh", "pool"])?;
        let guest = Guest::new("full")
            .uefi(variables)
            .disk("vda", "raw", &plain)
            .block("vdb", DEVICE)
            .volume("vdc", "pool", "volume.img")
            .device(
                "<disk type='file' device='cdrom'><source file='/lab/cd.iso'/><target dev='sda' bus='sata'/><readonly/></disk>\
                 <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>",
            );
        guest.define(one)?;
        // Its first start makes variables and TPM state.
        let starts = firmware_starts(lab, one, "full", variables, 0)?;
        let uuid = one.virsh(&["domuuid", "full"])?;
        let tpm = format!("/var/lib/libvirt/swtpm/{uuid}/tpm2/tpm2-00.permall");
        let logs = [
            "/var/log/libvirt/qemu/full.log",
            "/var/log/swtpm/libvirt/qemu/full-swtpm.log",
        ];
        let told = digests(one, &logs)?;
        // What another guest of its new name has left.
        let another = "/var/log/libvirt/qemu/fuller.log";
        shell(
            two,
            &format!("mkdir -p /var/log/libvirt/qemu; hostname >{another}"),
        )?;
        let there = [&plain, DEVICE, "/srv/pool/volume.img", variables, &tpm];
        let digest = digests(one, &there)?;
        let owner = |host: &Host| {
            shell(
                host,
                &format!("stat -c '%a %U:%G' {tpm} {variables} $(dirname {tpm})"),
            )
        };
        let owned = owner(one)?;

        let xml = one.virsh(&["dumpxml", "full", "--migratable", "--inactive"])?;
        fs::write(lab.share().join("full.xml"), xml.replace(&plain, elsewhere))?;
        shell(two, "mkdir -p /srv/elsewhere")?;
        let options = [
            "--undefinesource",
            "--dname",
            "fuller",
            "--xml",
            "/lab/full.xml",
            "--persistent-xml",
            "/lab/full.xml",
        ];
        one.move_cold("full", two, &options)?;
        two.has_shut_off("fuller")?;
        let here = [elsewhere, DEVICE, "/srv/pool/volume.img", variables, &tpm];
        let arrived = digests(two, &here)?;
        ensure!(
            arrived == digest,
            "files differ: {here:?} are {arrived:?}, were {digest:?}"
        );
        ensure!(owner(two)? == owned, "{} was {owned}", owner(two)?);
        // No guest of host2's has had a TPM yet: there is no directory for swtpm's.
        let arrived = [
            "/var/log/libvirt/qemu/fuller.log.from-1",
            "/var/log/libvirt/qemu/fuller-swtpm.log",
        ];
        ensure!(digests(two, &arrived)? == told, "the logs have not come along");
        ensure!(
            two.run(&["cat", another])? == "host2",
            "another guest's log was written over"
        );
        ensure!(!logs.iter().any(|log| one.has(log)), "logs stay on host1");
        ensure!(
            two.virsh(&["vol-list", "pool"])?.contains("volume.img"),
            "the pool was not refreshed"
        );
        ensure!(one.state("full")?.is_none() && !one.virsh(&["vol-list", "pool"])?.contains("volume.img"));
        same_files(&before, &one.guests_files()?)?;
        // The firmware goes on where it was.
        let again = firmware_starts(lab, two, "fuller", variables, starts)?;
        ensure!(again == starts + 1, "{again} starts, after {starts}");
        with_a_file_system_and_a_tpm(lab).context("a guest that looks at what it has")?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}

/// The guest itself finds its files as they were, and its TPM.
fn with_a_file_system_and_a_tpm(lab: &Lab) -> Result<()> {
    let (one, two) = (lab.host(1), lab.host(2));
    let disk = format!("{IMAGES}/system.img");
    file_system(one, &disk, 32)?;
    let asked = Config {
        files: Some("vda".into()),
        tpm: true,
        set: 1,
        ..Config::default()
    };
    Guest::new("system")
        .linux(lab, &asked)?
        .disk("vda", "raw", &disk)
        .device("<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>")
        .define(one)?;
    // Each start adds a file, and ends without a warning.
    let first = one.boots_until(lab, "system", found)?;
    ensure!(first.files == 1, "{first:?}");
    one.move_cold("system", two, &["--undefinesource", "--p2p"])?;
    let second = two.boots_until(lab, "system", found)?;
    let next = Found {
        files: 2,
        resets: first.resets + 1,
    };
    ensure!(second == next, "{second:?}, after {first:?}");
    // 1: what it had no time to put away was put in order.
    shell(two, &format!("e2fsck -fp {disk} || test $? -eq 1")).map(drop)
}

/// An ext4 with one file that is named by its content's digest.
fn file_system(host: &Host, disk: &str, mib: u64) -> Result<()> {
    let mut content = vec![0; 8 << 20];
    fs::File::open("/dev/urandom")?.read_exact(&mut content)?;
    let tree = "/run/tree";
    fs::create_dir_all(host.path(tree))?;
    fs::write(host.path(tree).join(name_of(&content)), content)?;
    shell(
        host,
        &format!("mkfs.ext4 -q -d {tree} {disk} {mib}M; rm -r {tree}"),
    )
    .map(drop)
}

/// What a guest found at its start.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    files: u32,
    resets: u32,
}

fn found(said: &str) -> Option<Found> {
    let number = |what: &str| {
        // Firmware may have left something before it.
        let (number, _) = said.split_once(what)?.1.split_once('\r')?;
        number.parse().ok()
    };
    Some(Found {
        files: number("ferry: files ok read=")?,
        resets: number("ferry: tpm resets=")?,
    })
}

/// Starts a UEFI guest until its firmware has counted that in its variables, and ends it; how often it has been started by now.
fn firmware_starts(lab: &Lab, host: &Host, guest: &str, variables: &str, before: u32) -> Result<u32> {
    serial(&lab.share().join("full.serial"))?;
    host.virsh(&["start", guest])?;
    let counted = wait_for("the firmware to count its start", PATIENCE, || {
        Ok(starts(&fs::read(host.path(variables))?).filter(|starts| *starts > before))
    })?;
    host.ends(guest)?;
    Ok(counted)
}

/// The higher half of UEFI's monotonic counter, which grows with each start: the variable MTC (edk2,
/// `MonotonicCounterRuntimeDxe`, `AUTHENTICATED_VARIABLE_HEADER`).
fn starts(variables: &[u8]) -> Option<u32> {
    const NAME: &[u8] = b"M\0T\0C\0\0\0";
    /// Before the name, and where in it the state is.
    const HEADER: usize = 60;
    const STATE: usize = 2;
    /// The variable is whole, and none has taken its place.
    const ADDED: u8 = 0x3f;
    let mut places = variables
        .windows(NAME.len())
        .enumerate()
        .filter(|(_, window)| *window == NAME);
    let data = places.find_map(|(at, _)| {
        let header = variables.get(at.checked_sub(HEADER)?..at)?;
        let data = variables.get(at + NAME.len()..at + NAME.len() + 4)?;
        (header[STATE] == ADDED).then_some(data)
    });
    Some(u32::from_le_bytes(data?.try_into().ok()?))
}

/// What the destination has is not copied, what both see is left alone, what others need stays, and without
/// --undefinesource everything does.
#[test]
fn bases_shared_files_and_others() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let (one, two) = (lab.host(1), lab.host(2));
        let [base, top, sibling] =
            ["base.raw", "top.qcow2", "sibling.qcow2"].map(|name| format!("{IMAGES}/{name}"));
        Content::sparse(64).write(one, &base)?;
        let overlay = format!("qemu-img create -q -f qcow2 -b {base} -F raw");
        shell(
            one,
            &format!("{overlay} {top}; {overlay} {sibling}; qemu-io -c 'write -P 7 5M 1M' -f qcow2 {top}"),
        )?;
        Content::sparse(8).write(one, "/lab/shared.img")?;
        Guest::new("inc")
            .disk("vda", "qcow2", &top)
            .disk("vdb", "raw", "/lab/shared.img")
            .define(one)?;
        Guest::new("sibling").disk("vda", "qcow2", &sibling).define(one)?;
        let digest = digests(one, &[&base, &top, "/lab/shared.img"])?;

        // All of it: the base goes along, and stays for the sibling.
        one.move_cold("inc", two, &["--undefinesource"])?;
        ensure!(
            digests(two, &[&base, &top, "/lab/shared.img"])? == digest,
            "files differ"
        );
        ensure!(
            one.has(&base) && !one.has(&top),
            "the base, or the overlay, is not where it should be"
        );
        two.boots(lab, "inc")?;
        // Back: the base is there. The copy of the guest that stays behind is whole.
        let digest = digests(two, &[&base, &top, "/lab/shared.img"])?;
        let back = two.underway(
            "inc",
            one,
            &["--offline", "--persistent", "--copy-storage-inc"],
            &[],
        )?;
        back.succeeds()?;
        for host in [one, two] {
            host.has_shut_off("inc")?;
            ensure!(
                digests(host, &[&base, &top, "/lab/shared.img"])? == digest,
                "files differ on {}",
                host.name()
            );
        }
        one.boots(lab, "sibling")?;
        one.boots(lab, "inc")?;
        two.virsh(&["undefine", "inc"])?;
        two.run(&["rm", &base, &top])?;

        // Nobody can tell what an overlay stands on that does not say of what format its base is: nothing is deleted.
        let odd = format!("{IMAGES}/odd.qcow2");
        // The magic of the header's extension that says so.
        shell(
            one,
            &format!("{overlay} {odd}; LC_ALL=C sed -i 's/\\xe2y[*]\\xca/1234/' {odd}"),
        )?;
        let found = one.run(&["qemu-img", "info", "--output=json", &odd])?;
        ensure!(!found.contains("backing-filename-format"), "{found}");
        one.virsh(&["undefine", "sibling"])?;
        Guest::new("odd").disk("vda", "qcow2", &odd).define(one)?;
        one.move_cold("inc", two, &["--undefinesource"])?;
        ensure!(
            one.has(&base) && one.has(&top),
            "files of an unknown use are deleted"
        );
        one.virsh(&["undefine", "odd"])?;
        one.run(&["rm", &base, &top, &odd])?;
        two.move_cold("inc", one, &["--undefinesource"])?;

        // A guest has more while it runs than its definition says.
        Guest::new("holder")
            .device(
                "<controller type='pci' index='0' model='pcie-root'/>\
                 <controller type='pci' index='1' model='pcie-root-port'/>\
                 <controller type='pci' index='2' model='pcie-root-port'/>\
                 <controller type='pci' index='3' model='pcie-root-port'/>",
            )
            .define(one)?;
        serial(&lab.share().join("holder.serial"))?;
        one.virsh(&["start", "holder"])?;
        let attach = "--subdriver raw --sourcetype file --mode readonly --live";
        shell(one, &format!("virsh attach-disk holder {base} vdb {attach}"))?;
        one.move_cold("inc", two, &["--undefinesource"])?;
        ensure!(
            one.has(&base) && !one.has(&top),
            "the base, or the overlay, is not where it should be"
        );
        one.ends("holder")?;
        lab.assert_clean(1)?;
        lab.assert_clean(2)
    })
}
