//! The disks of a guest that is shut off go to another place of its host, and are whole in exactly one place whatever happens.

use anyhow::{ensure, Context, Result};
use ferry_tests::cold::{same_files, serial, shell, Content, Guest, Writer, IMAGES};
use ferry_tests::fault::{engine, signal};
use ferry_tests::host::Host;
use ferry_tests::lab::{Lab, Options};
use ferry_tests::scene::PATIENCE;
use ferry_tests::storage::Held;
use ferry_tests::wait::wait_until;
use nix::sys::signal::Signal::{SIGCONT, SIGKILL};

/// What a guest sees in its disk, whatever images it is made of: by QEMU's own tool.
fn seen(host: &Host, format: &str, path: &str) -> Result<String> {
    let raw = "/var/lib/libvirt/seen.raw";
    // To QEMU the name of a data file is relative to where it runs, to libvirt to the image.
    shell(
        host,
        &format!("cd $(dirname {path}); qemu-img convert -f {format} -O raw {path} {raw}"),
    )?;
    let digest = host.sha256(raw)?;
    host.run(&["rm", raw])?;
    Ok(digest)
}

/// Everything that must be said.
fn says(said: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(said.contains(word), "'{word}' is not in what was said: {said}");
    }
    Ok(())
}

fn definition(host: &Host, guest: &str) -> Result<String> {
    host.virsh(&["dumpxml", guest, "--inactive", "--security-info"])
}

/// A chain whose headers name each other in all ways, a data file, a raw disk; all of it, one disk, and from pool to pool.
#[test]
fn disks_go_elsewhere_and_the_guest_boots_from_them() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let one = lab.host(1);
        let names = [
            "a/base.raw",
            "a/mid.qcow2",
            "top.qcow2",
            "data.qcow2",
            "data.raw",
            "plain.img",
        ];
        let [base, mid, top, image, data, plain] = names.map(|name| format!("{IMAGES}/{name}"));
        Content::sparse(64).write(one, &base)?;
        Content::sparse(24).write(one, &plain)?;
        shell(
            one,
            &format!(
                "mkdir -p /srv/fast /srv/more; cd {IMAGES}
                 qemu-img create -q -f qcow2 -b base.raw -F raw a/mid.qcow2
                 qemu-io -c 'write -P 7 20M 1M' -f qcow2 a/mid.qcow2
                 qemu-img create -q -f qcow2 -b {mid} -F qcow2 top.qcow2
                 qemu-io -c 'write -P 8 21M 1M' -f qcow2 top.qcow2
                 qemu-img create -q -f qcow2 -o data_file=data.raw,data_file_raw=on data.qcow2 16M
                 qemu-io -c 'write -P 9 3M 5M' -f qcow2 data.qcow2
                 chown libvirt-qemu:kvm top.qcow2; chmod 640 top.qcow2"
            ),
        )?;
        let guest = Guest::new("g")
            .disk("vda", "qcow2", &top)
            .disk("vdb", "qcow2", &image)
            .disk("vdc", "raw", &plain);
        guest.define(one)?;
        one.virsh(&["autostart", "g"])?;
        let (before, files) = (definition(one, "g")?, one.guests_files()?);
        let whole = |place: &str| -> Result<Vec<String>> {
            let at = |name: &str| format!("{place}/{name}");
            Ok(vec![
                seen(one, "qcow2", &at("top.qcow2"))?,
                seen(one, "qcow2", &at("data.qcow2"))?,
                one.sha256(&at("data.raw"))?,
                one.sha256(&at("plain.img"))?,
            ])
        };
        let content = whole(IMAGES)?;

        let said = one.move_storage(&["g", "--to", "/srv/fast", "--dry-run"])?;
        says(
            &said,
            &[
                "would move",
                &top,
                "/srv/fast/base.raw",
                "/srv/fast/data.raw",
                "vdc",
            ],
        )?;
        ensure!(
            definition(one, "g")? == before,
            "a dry run changed the definition"
        );
        same_files(&files, &one.guests_files()?)?;

        let said = one.move_storage(&["g", "--to", "/srv/fast/"])?;
        says(&said, &["g: moved", &format!("{mid} -> /srv/fast/mid.qcow2")])?;
        ensure!(!said.contains("not deleted"), "{said}");
        ensure!(whole("/srv/fast")? == content, "the disks have changed");
        let mut expected = before.clone();
        for path in [&top, &image, &plain] {
            let name = path.rsplit('/').next().context("a name")?;
            expected = expected.replace(path, &format!("/srv/fast/{name}"));
        }
        ensure!(
            definition(one, "g")? == expected,
            "{expected}\nis not {}",
            definition(one, "g")?
        );
        for path in [&base, &mid, &top, &image, &data, &plain] {
            ensure!(!one.has(path), "{path} is still there");
        }
        let owner = one.run(&["stat", "--format=%U:%G %a", "/srv/fast/top.qcow2"])?;
        ensure!(owner == "libvirt-qemu:kvm 640", "{owner}");
        let information = one.virsh(&["dominfo", "g"])?;
        ensure!(
            information
                .lines()
                .any(|line| line.split_whitespace().eq(["Autostart:", "enable"])),
            "{information}"
        );
        one.boots(lab, "g")?;

        // One of them, to a pool, though that is refreshed by nobody else.
        let content = whole("/srv/fast")?;
        one.virsh(&["pool-create-as", "more", "dir", "--target", "/srv/more"])?;
        one.move_storage(&["g", "--disk", "vdc", "--to", "more"])?;
        ensure!(
            one.virsh(&["vol-list", "more"])?.contains("plain.img"),
            "the pool was not refreshed"
        );
        ensure!(
            definition(one, "g")? == expected.replace("/srv/fast/plain.img", "/srv/more/plain.img"),
            "{}",
            definition(one, "g")?
        );
        one.move_storage(&["g", "--disk", "vdc", "--to", "/srv/fast"])?;
        ensure!(
            !one.virsh(&["vol-list", "more"])?.contains("plain.img"),
            "the pool was not refreshed"
        );
        // All is there already.
        let said = one.move_storage(&["g", "--to", "/srv/fast"])?;
        says(&said, &["nothing to move", "it is there already"])?;

        // A volume stays a volume, of another pool, and becomes a file elsewhere.
        one.virsh(&["undefine", "g"])?;
        one.virsh(&["pool-create-as", "images", "dir", "--target", IMAGES])?;
        shell(
            one,
            &format!("mv /srv/fast/plain.img {IMAGES}/volume.img; virsh pool-refresh images"),
        )?;
        Guest::new("v")
            .volume("vda", "images", "volume.img")
            .define(one)?;
        one.move_storage(&["v", "--to", "more"])?;
        says(&definition(one, "v")?, &["pool='more' volume='volume.img'"])?;
        one.move_storage(&["v", "--to", "/srv/fast"])?;
        says(
            &definition(one, "v")?,
            &["<disk type='file'", "file='/srv/fast/volume.img'"],
        )?;
        ensure!(
            one.sha256("/srv/fast/volume.img")? == content[3],
            "the disk has changed"
        );
        one.boots(lab, "v")?;
        lab.assert_clean(1)
    })
}

/// Snapshots inside the images, and checkpoints, are of the disks where these are.
#[test]
fn snapshots_go_along() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let one = lab.host(1);
        let [old, new] = [IMAGES, "/srv/fast"].map(|place| format!("{place}/g.qcow2"));
        let raw = format!("{IMAGES}/g.raw");
        Content::sparse(64).write(one, &raw)?;
        shell(
            one,
            &format!("mkdir /srv/fast; qemu-img convert -f raw -O qcow2 {raw} {old}; rm {raw}"),
        )?;
        Guest::new("g").disk("vda", "qcow2", &old).define(one)?;
        let described = |what: &str, name: &str| -> Result<String> {
            one.virsh(&[&format!("{what}-dumpxml"), "g", name, "--security-info"])
        };
        let write = |pattern: u8, path: &str| -> Result<()> {
            shell(
                one,
                &format!("qemu-io -c 'write -P {pattern} 22M 1M' -f qcow2 {path}"),
            )
            .map(drop)
        };
        one.virsh(&["snapshot-create-as", "g", "first"])?;
        write(10, &old)?;
        serial(&lab.share().join("g.serial"))?;
        one.virsh(&["start", "g"])?;
        one.virsh(&["snapshot-create-as", "g", "second"])?;
        one.ends("g")?;
        write(11, &old)?;
        let before = [described("snapshot", "first")?, described("snapshot", "second")?];
        ensure!(before[1].matches(&old).count() == 2, "{}", before[1]);
        one.move_storage(&["g", "--to", "/srv/fast"])?;
        ensure!(!one.has(&old), "{old} is still there");
        let after = [described("snapshot", "first")?, described("snapshot", "second")?];
        ensure!(after == before.map(|xml| xml.replace(&old, &new)), "{after:?}");
        let current = one.virsh(&["snapshot-current", "g", "--name"])?;
        ensure!(current == "second", "{current}");
        // It goes back to both of them, from there.
        one.virsh(&["snapshot-revert", "g", "second"])?;
        one.wait_for_state("g", "running")?;
        one.ends("g")?;
        one.virsh(&["snapshot-revert", "g", "first"])?;
        let read = shell(one, &format!("qemu-io -c 'read -P 0 22M 1M' -f qcow2 {new}"))?;
        ensure!(!read.contains("verification failed"), "{read}");
        one.boots(lab, "g")?;

        for snapshot in ["second", "first"] {
            one.virsh(&["snapshot-delete", "g", snapshot])?;
        }
        serial(&lab.share().join("g.serial"))?;
        one.virsh(&["start", "g"])?;
        one.virsh(&["checkpoint-create-as", "g", "c"])?;
        one.ends("g")?;
        let before = described("checkpoint", "c")?;
        one.move_storage(&["g", "--to", IMAGES])?;
        let after = described("checkpoint", "c")?;
        ensure!(
            before.contains(&new) && after == before.replace(&new, &old),
            "{after}"
        );
        let information = one.run(&["qemu-img", "info", &old])?;
        ensure!(information.contains("name: c"), "{information}");
        one.boots(lab, "g")?;
        lab.assert_clean(1)
    })
}

/// What is in the way is told before a byte moves; what others need stays.
#[test]
fn what_is_in_the_way_is_told_at_once() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let one = lab.host(1);
        let [base, top, plain, shared] =
            ["base.raw", "top.qcow2", "plain.img", "shared.img"].map(|name| format!("{IMAGES}/{name}"));
        Content::sparse(64).write(one, &base)?;
        Content::sparse(16).write(one, &plain)?;
        Content::sparse(16).write(one, &shared)?;
        shell(
            one,
            &format!(
                "mkdir -p /srv/fast; cd {IMAGES}
                 qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2
                 qemu-img create -q -f qcow2 -b base.raw -F raw sibling.qcow2
                 echo mine >/srv/fast/plain.img"
            ),
        )?;
        let guest = Guest::new("g")
            .disk("vda", "qcow2", &top)
            .disk("vdb", "raw", &plain)
            .device(&format!(
                "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{shared}'/>\
                 <target dev='vdc' bus='virtio'/><shareable/></disk>"
            ));
        guest.define(one)?;
        Guest::new("sibling")
            .disk("vda", "qcow2", &format!("{IMAGES}/sibling.qcow2"))
            .define(one)?;
        let before = definition(one, "g")?;
        let refused = |arguments: &[&str], words: &[&str]| -> Result<()> {
            let files = one.guests_files()?;
            let said = one.move_storage_refused(arguments)?;
            println!("{said}");
            says(&said, words)?;
            ensure!(definition(one, "g")? == before, "the definition has changed");
            same_files(&files, &one.guests_files()?)
        };

        serial(&lab.share().join("g.serial"))?;
        one.virsh(&["start", "g"])?;
        refused(
            &["g", "--to", "/srv/fast"],
            &["of guest g", "it runs", "virsh blockcopy g", "host1"],
        )?;
        one.ends("g")?;
        // All at once.
        serial(&lab.share().join("g.serial"))?;
        one.virsh(&["start", "g"])?;
        one.virsh(&["managedsave", "g"])?;
        let writer = Writer::of(one, &top)?;
        refused(
            &["g", "--to", "/srv/fast"],
            &[
                "virsh managedsave-remove g",
                "plain.img exists",
                "top.qcow2 is in use",
                "host1",
            ],
        )?;
        drop(writer);
        one.virsh(&["managedsave-remove", "g"])?;
        one.virsh(&["snapshot-create-as", "sibling", "s", "--disk-only"])?;
        refused(
            &["sibling", "--to", "/srv/fast"],
            &[
                "its snapshot s",
                "a file of its own",
                "sibling.s",
                "virsh snapshot-delete",
            ],
        )?;
        one.virsh(&["snapshot-delete", "sibling", "s", "--metadata"])?;

        refused(
            &["g", "--disk", "vdc", "--to", "/srv/fast"],
            &["vdc", "shareable"],
        )?;
        refused(
            &["g", "--disk", "vdx", "--disk", "vda", "--to", "/srv/none"],
            &["vdx", "no directory /srv/none"],
        )?;
        refused(
            &["g", "--to", "nowhere"],
            &["storage pool nowhere does not exist"],
        )?;
        refused(&["nobody", "--to", "/srv/fast"], &["nobody"])?;
        one.run(&["mount", "-t", "tmpfs", "-o", "size=1m", "small", "/mnt"])?;
        refused(&["g", "--to", "/mnt"], &["/mnt has", "free"])?;
        one.run(&["umount", "/mnt"])?;

        // The base is the sibling's, too, and stays; the header then names it where it is.
        let content = seen(one, "qcow2", &top)?;
        let said = one.move_storage(&["g", "--disk", "vda", "--to", "/srv/fast"])?;
        says(&said, &[&format!("stays: {base} (guest sibling refers to it)")])?;
        ensure!(
            one.has(&base) && !one.has(&top),
            "the base, or the overlay, is not where it should be"
        );
        ensure!(
            seen(one, "qcow2", "/srv/fast/top.qcow2")? == content,
            "the disk has changed"
        );
        one.boots(lab, "sibling")?;
        one.boots(lab, "g")?;
        // To keep what has moved is the administrator's choice.
        one.configure("cold.source_storage = \"keep\"\n")?;
        let said = one.move_storage(&["g", "--disk", "vda", "--to", IMAGES])?;
        says(&said, &["not deleted: /srv/fast/top.qcow2"])?;
        ensure!(
            one.has("/srv/fast/top.qcow2") && one.has(&top),
            "nothing was to be deleted"
        );
        one.boots(lab, "g")?;
        lab.assert_clean(1)
    })
}

/// A guest of two disks, one of them with a base, and where its files are.
struct Scene<'a> {
    lab: &'a Lab,
    one: &'a Host,
    uuid: String,
    /// Its definition and all guests' files, with its disks at the one place and at the other.
    states: [(String, Vec<String>); 2],
    content: [String; 2],
}

const PLACES: [&str; 2] = [IMAGES, "/srv/fast"];
/// The pool of a medium, which does not move.
const MEDIA: [&str; 5] = ["pool-create-as", "media", "dir", "--target", "/srv/media"];

impl<'a> Scene<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let one = lab.host(1);
        Content::dense(240, 200).write(one, &format!("{IMAGES}/base.raw"))?;
        Content::sparse(16).write(one, &format!("{IMAGES}/plain.img"))?;
        shell(
            one,
            &format!("mkdir -p /srv/fast; qemu-img create -q -f qcow2 -b {IMAGES}/base.raw -F raw {IMAGES}/top.qcow2"),
        )?;
        shell(one, "mkdir /srv/media; truncate -s 1M /srv/media/cd.iso")?;
        one.virsh(&MEDIA)?;
        let guest = Guest::new("g").disk("vda", "qcow2", &format!("{IMAGES}/top.qcow2"));
        guest
            .disk("vdb", "raw", &format!("{IMAGES}/plain.img"))
            .device(
                "<disk type='volume' device='cdrom'><source pool='media' volume='cd.iso'/><target dev='sda' bus='sata'/>\
                 <readonly/></disk>",
            )
            .define(one)?;
        let mut scene = Scene {
            lab,
            one,
            uuid: one.virsh(&["domuuid", "g"])?,
            states: Default::default(),
            content: Default::default(),
        };
        scene.content = scene.content(0)?;
        let (definition, files) = (definition(one, "g")?, one.guests_files()?);
        let there = |text: &str| {
            ["base.raw", "top.qcow2", "plain.img"]
                .iter()
                .fold(text.to_owned(), |text, name| {
                    text.replace(&format!("{IMAGES}/{name}"), &format!("/srv/fast/{name}"))
                })
        };
        let mut files_there: Vec<_> = files.iter().map(|file| there(file)).collect();
        files_there.sort();
        scene.states = [(definition.clone(), files), (there(&definition), files_there)];
        Ok(scene)
    }

    fn content(&self, place: usize) -> Result<[String; 2]> {
        let at = |name: &str| format!("{}/{name}", PLACES[place]);
        Ok([
            seen(self.one, "qcow2", &at("top.qcow2"))?,
            self.one.sha256(&at("plain.img"))?,
        ])
    }

    /// The guest is whole at this place, nothing is left anywhere else, and it starts.
    fn is_at(&self, place: usize) -> Result<()> {
        let (wanted, files) = &self.states[place];
        let found = definition(self.one, "g")?;
        ensure!(found == *wanted, "{found}\nis not\n{wanted}");
        same_files(files, &self.one.guests_files()?)?;
        ensure!(self.content(place)? == self.content, "the disks have changed");
        self.lab.assert_clean(1)?;
        self.one.boots(self.lab, "g")
    }

    /// It does not start while nobody knows which of its files are the right ones.
    fn does_not_start(&self) -> Result<()> {
        let output = self.one.exec(&["virsh", "start", "g"])?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success(), "the guest starts");
        says(&said, &["its disks are being moved", "virt-ferry recover g"])
    }

    /// Whatever was open is brought to an end.
    fn settles(&self) -> Result<()> {
        self.one.run(&["virt-ferry", "recover", "g"]).map(drop)
    }

    /// A second try moves it, and it comes back.
    fn moves_again(&self) -> Result<()> {
        self.one.move_storage(&["g", "--to", PLACES[1]])?;
        self.is_at(1)?;
        self.comes_back()
    }

    fn comes_back(&self) -> Result<()> {
        self.one.move_storage(&["g", "--to", PLACES[0]])?;
        // Its header names the base where it is, as it did.
        self.is_at(0)
    }
}

/// The command, the operator or the engine ends it while files are copied.
#[test]
fn it_is_disturbed_while_it_copies() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let one = scene.one;
        let begun = || -> Result<_> {
            let moving = one.begin_storage(&["g", "--to", PLACES[1]])?;
            moving.stops_while_copying(&scene.uuid)?;
            scene.does_not_start()?;
            Ok(moving)
        };
        // Ctrl-C removes what was copied.
        let moving = one.begin_storage_by_hand(&["g", "--to", PLACES[1]])?;
        moving.stops_while_copying(&scene.uuid)?;
        let moving = moving.interrupted()?;
        signal(&engine(one)?, SIGCONT)?;
        says(&moving.fails()?, &["canceled"])?;
        scene.is_at(0).context("after Ctrl-C")?;
        // The engine dies.
        let moving = begun()?;
        signal(&engine(one)?, SIGKILL)?;
        says(&moving.fails()?, &["engine", "host1"])?;
        scene.settles()?;
        scene.is_at(0).context("after the engine's death")?;
        // The daemon dies: its engine undoes what it did, when it can.
        let moving = begun()?;
        let daemon = one.processes_named("libvirtd")?.pop().context("no libvirtd")?;
        signal(&daemon, SIGKILL)?;
        signal(&engine(one)?, SIGCONT)?;
        moving.fails()?;
        one.restart_libvirtd(true)?;
        scene.settles()?;
        scene.is_at(0).context("after the daemon's death")?;
        // The command dies: it is the daemon that moves the disks, and that does not end itself before they are there.
        let moving = begun()?;
        one.libvirtd_ends_when_idle()?;
        moving.signal(SIGKILL)?;
        moving.fails()?;
        one.libvirtd_stays()?;
        signal(&engine(one)?, SIGCONT)?;
        wait_until("the move to end", PATIENCE, || {
            Ok(one.journal_state(&scene.uuid)?.is_none())
        })?;
        wait_until("the engine to end", PATIENCE, || {
            Ok(one.processes_named("virt-ferry-engine")?.is_empty())
        })?;
        one.libvirtd_has_ended()?;
        scene.is_at(1).context("after the command's death")?;
        scene.comes_back()
    })
}

/// Daemon and engine die when the copies are there: what the definition names is the guest's.
#[test]
fn they_die_around_the_commitment() -> Result<()> {
    Lab::with(Options::default(), |lab| {
        let scene = Scene::new(lab)?;
        let one = scene.one;
        for (state, defined, place) in [
            ("committing", false, 0),
            ("placed", false, 0),
            ("placed", true, 1),
            ("owned", false, 1),
        ] {
            let held = Held::at(one, state)?;
            let moving = one.begin_storage(&["g", "--to", PLACES[1]])?;
            held.has_come(&scene.uuid, state)?;
            if state != "owned" {
                scene.does_not_start().context(state)?;
            }
            // What does not move has no part in whose files are whose.
            let without_media = (state, defined) == ("placed", false);
            if without_media {
                one.virsh(&["pool-destroy", "media"])?;
            }
            let daemon = one.processes_named("libvirtd")?.pop().context("no libvirtd")?;
            let engine = engine(one)?;
            // The daemon first, or it might tell of the engine's end.
            for process in [daemon, engine] {
                signal(&process, SIGKILL)?;
            }
            says(&moving.fails()?, &["the daemon was lost", "virt-ferry recover g"])?;
            if defined {
                // As libvirt left it, had they died a moment later.
                let names = ["base.raw", "top.qcow2", "plain.img"];
                let edits = names.map(|name| format!("-e s#{IMAGES}/{name}#/srv/fast/{name}#"));
                shell(
                    one,
                    &format!("sed -i {} /etc/libvirt/qemu/g.xml", edits.join(" ")),
                )?;
            }
            one.restart_libvirtd(true)?;
            drop(held);
            scene.settles()?;
            if without_media {
                one.virsh(&MEDIA)?;
            }
            scene
                .is_at(place)
                .with_context(|| format!("{state}, {defined}"))?;
            match place {
                0 => scene.moves_again(),
                _ => scene.comes_back(),
            }
            .context(state)?;
        }
        Ok(())
    })
}
