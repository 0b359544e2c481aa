//! Where an arriving guest's files go: the destination's own decision, made from the definition that libvirt will
//! register here. Pure, but for the two questions that only this host can answer ([`Here`]).

use super::definition::{Definition, Source};
use super::inventory::{needed, LOGS, TPM};
use ferry_contract::cold::{File, Inventory, Medium, Part};
use std::path::{Component, Path, PathBuf};

/// What the plan has to know of this host.
pub trait Here {
    /// Where the bytes of a disk are or will be; `None` for one without.
    ///
    /// # Errors
    /// Why that is not known, in a sentence.
    fn path_of(&self, source: &Source) -> Result<Option<PathBuf>, String>;
    /// Whether a file is there.
    fn exists(&self, path: &Path) -> bool;
    /// Whether this is, or will be, in an active storage pool.
    fn keeps_images(&self, path: &Path) -> bool;
}

/// Where everything goes, or is looked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Places {
    /// Of each file, in the inventory's order.
    pub files: Vec<PathBuf>,
    /// Of what must be here.
    pub media: Vec<Medium>,
}

/// Plans the arrival.
///
/// # Errors
/// All problems, each in a sentence.
pub fn places(
    inventory: &Inventory,
    guest: &Definition,
    name: &str,
    here: &impl Here,
) -> Result<Places, Vec<String>> {
    let mut problems = Vec::new();
    let mut files: Vec<PathBuf> = Vec::new();
    for file in &inventory.files {
        // The layers above it come before it.
        let place = place(file, inventory, &files, guest, name, here);
        match place.and_then(|place| images_only(place, file, guest, here)) {
            Ok(place) if files.contains(&place) => {
                problems.push(format!(
                    "two of the guest's files would go to {}",
                    place.display()
                ));
                files.push(place);
            }
            Ok(place) => files.push(place),
            Err(why) => {
                problems.push(why);
                files.push(PathBuf::new());
            }
        }
    }
    let media = media(inventory, guest, here, &mut problems);
    match problems.is_empty() {
        true => Ok(Places { files, media }),
        false => Err(problems),
    }
}

/// A place that only the source's headers or snapshots name, and no definition, must be one where this host keeps images:
/// beside a disk of the guest's, or in a pool. Beside a device are those of others.
fn images_only(place: PathBuf, file: &File, guest: &Definition, here: &impl Here) -> Result<PathBuf, String> {
    let named = match &file.part {
        Part::Disk { layer: 0, .. } | Part::Nvram | Part::Tpm | Part::Log => true,
        Part::Disk { target, layer, .. } => guest.disk(target).is_some_and(|disk| {
            disk.layers.get(usize::from(*layer) - 1).and_then(Source::path) == Some(&place)
        }),
        Part::Data { .. } | Part::Other => false,
    };
    let disks = guest.disks.iter().filter(|disk| !disk.media);
    let mut disks = disks.filter_map(|disk| here.path_of(&disk.source).ok().flatten());
    let beside = |disk: PathBuf| {
        disk.parent().is_some_and(|directory| {
            // Everything is below the root.
            directory.parent().is_some() && !directory.starts_with("/dev") && place.starts_with(directory)
        })
    };
    if named || here.keeps_images(&place) || disks.any(beside) {
        return Ok(place);
    }
    Err(format!(
        "{} is neither beside a disk of the guest's that is a file nor in the directory of a storage pool: make one of its \
         directory (virsh pool-create-as NAME dir --target DIRECTORY), or name it in the definition (<backingStore>)",
        place.display()
    ))
}

fn place(
    file: &File,
    inventory: &Inventory,
    before: &[PathBuf],
    guest: &Definition,
    name: &str,
    here: &impl Here,
) -> Result<PathBuf, String> {
    match &file.part {
        Part::Disk {
            target,
            layer: 0,
            format,
            ..
        } => {
            let disk = guest
                .disk(target)
                .ok_or_else(|| format!("the definition has no disk {target}"))?;
            if disk.format != *format {
                return Err(format!(
                    "disk {target} is {format} at the source and {} in the definition",
                    disk.format
                ));
            }
            let path = here
                .path_of(&disk.source)
                .map_err(|why| format!("disk {target}: {why}"))?;
            path.ok_or_else(|| format!("disk {target} has no file in the definition"))
        }
        Part::Disk {
            target,
            layer,
            relative,
            ..
        } => {
            let named = guest
                .disk(target)
                .and_then(|disk| disk.layers.get(usize::from(*layer) - 1));
            match named.and_then(Source::path) {
                Some(path) => Ok(path.to_owned()),
                None if *relative => beside(file, target, *layer - 1, inventory, before),
                None => Ok(file.path.clone()),
            }
        }
        Part::Data {
            target,
            layer,
            relative: true,
        } => beside(file, target, *layer, inventory, before),
        Part::Data { .. } | Part::Other => Ok(file.path.clone()),
        Part::Nvram => guest
            .nvram
            .clone()
            .ok_or_else(|| "the definition has no place for the firmware's variables".into()),
        Part::Tpm => tpm(file, guest),
        Part::Log => log(file, inventory, name, here),
    }
}

/// The place of a file that the image of this disk and layer names relative to itself.
fn beside(
    file: &File,
    target: &str,
    layer: u16,
    inventory: &Inventory,
    before: &[PathBuf],
) -> Result<PathBuf, String> {
    let is_it = |other: &File| matches!(&other.part, Part::Disk { target: t, layer: l, .. } if t == target && *l == layer);
    let above = inventory
        .files
        .iter()
        .position(is_it)
        .and_then(|at| Some((at, before.get(at)?)));
    let (at, place) = above.ok_or_else(|| {
        format!(
            "the image that names {} is shared with another disk: it must stay where it is",
            file.path.display()
        )
    })?;
    let (Some(from), Some(to)) = (inventory.files[at].path.parent(), place.parent()) else {
        return Err(format!("{} has no directory", file.path.display()));
    };
    Ok(relative(from, &file.path)
        .into_iter()
        .fold(to.to_owned(), |mut place, part| {
            match part {
                Component::ParentDir => {
                    place.pop();
                }
                part => place.push(part),
            }
            place
        }))
}

/// The way from a directory to a file, both absolute and plain.
fn relative<'a>(from: &'a Path, to: &'a Path) -> Vec<Component<'a>> {
    let common = from
        .components()
        .zip(to.components())
        .take_while(|(a, b)| a == b)
        .count();
    let up = from.components().skip(common).map(|_| Component::ParentDir);
    up.chain(to.components().skip(common)).collect()
}

fn tpm(file: &File, guest: &Definition) -> Result<PathBuf, String> {
    let tpm = guest.tpm.as_ref().ok_or("the definition has no emulated TPM")?;
    let own = Path::new(TPM).join(guest.uuid.to_string());
    if let Some(source) = &tpm.source {
        let name = file.path.file_name().ok_or("a file of its TPM has no name")?;
        return Ok(source.join(name));
    }
    // What the source calls a TPM's file must be one here.
    match file.path.starts_with(&own) {
        true => Ok(file.path.clone()),
        false => Err(format!(
            "{} is not where libvirt keeps a TPM's state",
            file.path.display()
        )),
    }
}

/// Logs go by the guest's name; one of an earlier stay is kept, and the new one gets a number as if it had been rotated.
fn log(file: &File, inventory: &Inventory, name: &str, here: &impl Here) -> Result<PathBuf, String> {
    let old = &inventory.guest.name;
    let rest = file
        .path
        .file_name()
        .and_then(|file| file.to_str()?.strip_prefix(old.as_str()));
    let directory = LOGS
        .into_iter()
        .map(Path::new)
        .find(|logs| file.path.parent() == Some(logs));
    let (Some(rest), Some(directory)) = (rest, directory) else {
        return Err(format!("{} is not where libvirt keeps logs", file.path.display()));
    };
    // swtpm's is made with a host's first TPM; QEMU's is always there.
    let directory = match here.exists(directory) {
        true => directory,
        false => Path::new(LOGS[0]),
    };
    let plain = directory.join(format!("{name}{rest}"));
    if !here.exists(&plain) {
        return Ok(plain);
    }
    let numbered = (1..1000).map(|number| directory.join(format!("{name}{rest}.from-{number}")));
    let mut free = numbered.filter(|place| !here.exists(place));
    free.next()
        .ok_or_else(|| format!("{} and a thousand like it exist", plain.display()))
}

/// Where the definition has what the source says must be here.
fn media(
    inventory: &Inventory,
    guest: &Definition,
    here: &impl Here,
    problems: &mut Vec<String>,
) -> Vec<Medium> {
    let mut media = Vec::new();
    for medium in &inventory.media {
        let path = match guest.disk(&medium.target) {
            Some(disk) => here.path_of(&disk.source),
            // A kernel, a directory: as the definition has it, which names all of them.
            None => Ok(guest
                .needed
                .iter()
                .find(|path| needed(path) == medium.target)
                .cloned()),
        };
        match path {
            Ok(Some(path)) => media.push(Medium {
                target: medium.target.clone(),
                path,
            }),
            // Ejected or renamed by the operator's own XML.
            Ok(None) => {}
            Err(why) => problems.push(format!("disk {}: {why}", medium.target)),
        }
    }
    media
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_contract::cold::Kind;
    use ferry_contract::session::Guest;
    use uuid::Uuid;

    const ID: &str = "00000000-0000-0000-0000-000000000007";

    /// A host on which these files are.
    struct Host(&'static [&'static str]);

    impl Here for Host {
        fn path_of(&self, source: &Source) -> Result<Option<PathBuf>, String> {
            match source {
                Source::Volume { pool, volume } if pool == "p" => Ok(Some(Path::new("/pool").join(volume))),
                Source::Volume { pool, .. } => Err(format!("storage pool {pool} does not exist")),
                other => Ok(other.path().map(Path::to_owned)),
            }
        }
        fn exists(&self, path: &Path) -> bool {
            self.0.iter().any(|file| Path::new(file) == path)
        }
        fn keeps_images(&self, path: &Path) -> bool {
            path.starts_with("/pool")
        }
    }

    fn disk(target: &str, layer: u16, relative: bool) -> Part {
        Part::Disk {
            target: target.into(),
            layer,
            format: "qcow2".into(),
            relative,
        }
    }

    fn inventory(files: &[(&str, Part)], media: &[(&str, &str)]) -> Inventory {
        Inventory {
            guest: Guest {
                name: "g".into(),
                uuid: Uuid::from_u128(7),
            },
            autostart: false,
            files: files
                .iter()
                .map(|(path, part)| File {
                    path: path.into(),
                    part: part.clone(),
                    kind: Kind::File,
                    size: 1,
                    allocated: 1,
                })
                .collect(),
            directories: Vec::new(),
            media: media
                .iter()
                .map(|(target, path)| Medium {
                    target: (*target).to_owned(),
                    path: path.into(),
                })
                .collect(),
            metadata: Vec::new(),
        }
    }

    fn definition(os: &str, devices: &str) -> Definition {
        let xml = format!(
            "<domain><name>g</name><uuid>{ID}</uuid><os>{os}</os><devices>{devices}</devices></domain>"
        );
        Definition::read(&xml).unwrap()
    }

    fn qcow2(target: &str, path: &str) -> String {
        format!(
            "<disk type='file'><driver type='qcow2'/><source file='{path}'/><target dev='{target}'/></disk>"
        )
    }

    fn files(
        inventory: &Inventory,
        guest: &Definition,
        name: &str,
        host: &Host,
    ) -> Result<Vec<String>, Vec<String>> {
        let places = places(inventory, guest, name, host)?;
        Ok(places
            .files
            .iter()
            .map(|path| path.to_str().unwrap().to_owned())
            .collect())
    }

    #[test]
    fn layers_follow_their_overlay_where_they_are_named_relative_to_it() {
        let data = Part::Data {
            target: "vda".into(),
            layer: 0,
            relative: true,
        };
        let chain = inventory(
            &[
                ("/a/top", disk("vda", 0, false)),
                ("/a/top.data", data),
                ("/a/b/mid", disk("vda", 1, true)),
                ("/a/base", disk("vda", 2, true)),
                ("/pool/root", disk("vda", 3, false)),
            ],
            &[],
        );
        let same = files(&chain, &definition("", &qcow2("vda", "/a/top")), "g", &Host(&[]));
        assert_eq!(
            same.unwrap(),
            ["/a/top", "/a/top.data", "/a/b/mid", "/a/base", "/pool/root"]
        );
        let moved = files(&chain, &definition("", &qcow2("vda", "/x/y/t")), "g", &Host(&[]));
        assert_eq!(
            moved.unwrap(),
            ["/x/y/t", "/x/y/top.data", "/x/y/b/mid", "/x/y/base", "/pool/root"]
        );
    }

    #[test]
    fn layers_go_where_the_definition_says() {
        let chain = inventory(
            &[
                ("/a/top", disk("vda", 0, false)),
                ("/a/base", disk("vda", 1, true)),
            ],
            &[],
        );
        let named = "<disk type='file'><driver type='qcow2'/><source file='/x/t'/><target dev='vda'/>\
                     <backingStore type='file'><format type='qcow2'/><source file='/y/b'/><backingStore/></backingStore></disk>";
        assert_eq!(
            files(&chain, &definition("", named), "g", &Host(&[])).unwrap(),
            ["/x/t", "/y/b"]
        );
    }

    #[test]
    fn firmware_tpm_and_logs_have_their_places() {
        let tpm = format!("{TPM}/{ID}/tpm2/tpm2-00.permall");
        let all = inventory(
            &[
                ("/v/g_VARS.fd", Part::Nvram),
                (&tpm, Part::Tpm),
                ("/var/log/libvirt/qemu/g.log", Part::Log),
                ("/var/log/swtpm/libvirt/qemu/g-swtpm.log", Part::Log),
            ],
            &[],
        );
        let guest = definition(
            "<nvram>/w/VARS.fd</nvram>",
            "<tpm><backend type='emulator' version='2.0'/></tpm>",
        );
        let host = Host(&[
            "/var/log/libvirt/qemu",
            "/var/log/swtpm/libvirt/qemu",
            "/var/log/libvirt/qemu/new.log",
        ]);
        assert_eq!(
            files(&all, &guest, "new", &host).unwrap(),
            [
                "/w/VARS.fd",
                &tpm,
                "/var/log/libvirt/qemu/new.log.from-1",
                "/var/log/swtpm/libvirt/qemu/new-swtpm.log"
            ]
        );
        // A host that has had no TPM yet.
        let places = files(&all, &guest, "new", &Host(&["/var/log/libvirt/qemu"])).unwrap();
        assert_eq!(
            places[2..],
            [
                LOGS[0].to_owned() + "/new.log",
                LOGS[0].to_owned() + "/new-swtpm.log"
            ]
        );
    }

    #[test]
    fn a_source_does_not_choose_where_this_host_is_written_to() {
        for (path, part) in [
            ("/etc/cron.d/x", Part::Tpm),
            ("/var/lib/libvirt/swtpm/another/tpm2/x", Part::Tpm),
            ("/etc/g.log", Part::Log),
            ("/var/log/libvirt/qemu/other.log", Part::Log),
            ("/a", disk("vda", 0, false)),
            ("/etc/cron.d/x", Part::Other),
            ("/etc/cron.d/x", disk("vdb", 1, false)),
            (
                "/etc/cron.d/x",
                Part::Data {
                    target: "vdb".into(),
                    layer: 0,
                    relative: false,
                },
            ),
        ] {
            let devices = format!(
                "<tpm><backend type='emulator'/></tpm>{}",
                qcow2("vdb", "/images/b")
            );
            let guest = definition("", &devices);
            assert!(
                files(&inventory(&[(path, part)], &[]), &guest, "g", &Host(&[])).is_err(),
                "{path}"
            );
        }
    }

    #[test]
    fn beside_a_device_are_those_of_others() {
        let chain = [
            ("/dev/sda", disk("vda", 0, false)),
            ("/dev/sdb", disk("vda", 1, false)),
        ];
        let guest = |backing: &str| {
            definition(
                "",
                &format!(
                    "<disk type='block'><driver type='qcow2'/><source dev='/dev/sda'/>{backing}<target dev='vda'/></disk>"
                ),
            )
        };
        let refused = files(&inventory(&chain, &[]), &guest(""), "g", &Host(&[])).unwrap_err();
        assert!(
            refused[0].starts_with("/dev/sdb is neither beside"),
            "{refused:?}"
        );
        let named =
            "<backingStore type='block'><format type='raw'/><source dev='/dev/sdb'/><backingStore/></backingStore>";
        let places = files(&inventory(&chain, &[]), &guest(named), "g", &Host(&[]));
        assert_eq!(places.unwrap(), ["/dev/sda", "/dev/sdb"]);
    }

    #[test]
    fn all_problems_are_told() {
        let all = inventory(
            &[
                ("/a", disk("vda", 0, false)),
                ("/b", disk("vdb", 0, false)),
                ("/c", disk("vdc", 0, false)),
                ("/d", disk("vdd", 0, false)),
                ("/e", disk("vde", 0, false)),
            ],
            &[("sda", "/iso")],
        );
        let guest = definition(
            "",
            &format!(
                "{}{}<disk type='volume'><driver type='qcow2'/><source pool='q' volume='v'/><target dev='vdc'/></disk>\
                 <disk type='file'><driver type='raw'/><source file='/d'/><target dev='vdd'/></disk>\
                 <disk type='volume' device='cdrom'><source pool='q' volume='i'/><target dev='sda'/></disk>",
                qcow2("vda", "/x"),
                qcow2("vdb", "/x")
            ),
        );
        let problems = files(&all, &guest, "g", &Host(&[])).unwrap_err();
        assert_eq!(problems.len(), 5, "{problems:#?}");
    }

    #[test]
    fn media_are_looked_for_where_the_definition_has_them() {
        let all = inventory(
            &[("/a", disk("vda", 0, false))],
            &[("sda", "/iso"), ("kernel", "/k/kernel"), ("sdb", "/gone")],
        );
        let guest = definition(
            "<kernel>/boot/kernel</kernel>",
            &format!(
                "{}<disk type='file' device='cdrom'><source file='/here/iso'/><target dev='sda'/></disk>",
                qcow2("vda", "/a")
            ),
        );
        let media = places(&all, &guest, "g", &Host(&[])).unwrap().media;
        let media: Vec<_> = media
            .iter()
            .map(|medium| (medium.target.as_str(), medium.path.to_str().unwrap()))
            .collect();
        assert_eq!(media, [("sda", "/here/iso"), ("kernel", "/boot/kernel")]);
    }
}
