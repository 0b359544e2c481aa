//! Which files of a guest's disks go to another directory, under which names, and whose headers must say so. Pure, but for
//! what only this host can tell of a file ([`Here`]).
//!
//! A file stays where it is when it is there already, is none (a device), or somebody else needs it: another guest, a disk of
//! this one that stays, or, of a base on a network file system, maybe a guest of another host. Then all that its header
//! names stays, too, for that must not be changed.

use crate::cold::image::Layer;
use crate::cold::inventory::{plain, OTHER_HOSTS};
use ferry_contract::cold::storage::Rename;
use ferry_contract::cold::{Item, Kept, Part};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A disk and its images, from the top.
#[derive(Debug, Clone)]
pub struct Chain {
    /// The disk (`vda`).
    pub target: String,
    /// What `qemu-img` found.
    pub layers: Vec<Layer>,
    /// It is to move.
    pub moves: bool,
}

/// What the plan has to know of this host.
pub trait Here {
    /// Whether it is a file, and no device.
    fn is_file(&self, path: &Path) -> bool;
    /// Whether it is in this directory, however both are written.
    fn is_in(&self, path: &Path, directory: &Path) -> bool;
    /// Who else refers to it, in a sentence.
    fn user(&self, path: &Path) -> Option<String>;
    /// Whether other hosts may see it, too.
    fn is_shared(&self, path: &Path) -> bool;
    /// Which file the kernel finds by this name: two names may lead to one, and a name with `..` past a symlink to another
    /// than it seems.
    fn real(&self, path: &Path) -> PathBuf;
}

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The files that move.
    pub items: Vec<Item>,
    /// Where each goes.
    pub places: Vec<PathBuf>,
    /// Headers that must name their backing file anew.
    pub renames: Vec<Rename>,
    /// Files of these disks that stay, and why.
    pub stays: Vec<Kept>,
    /// What the files that move are, as [`Here::real`] has it.
    reals: Vec<PathBuf>,
}

impl Plan {
    /// Where this file goes, as [`Here::real`] has it; `None` where it stays.
    pub fn place(&self, real: &Path) -> Option<&PathBuf> {
        let mut moving = self.reals.iter().zip(&self.places);
        moving.find(|(moves, _)| *moves == real).map(|(_, place)| place)
    }

    /// Whether this file moves, as [`Here::real`] has it, and how it is called.
    pub fn moves(&self, real: &Path) -> Option<&Path> {
        let mut moving = self.reals.iter().zip(&self.items);
        moving
            .find(|(moves, _)| *moves == real)
            .map(|(_, item)| item.path.as_path())
    }
}

/// Plans the move of these disks into a directory, as far as it can be done, and says what is in the way, each in a
/// sentence.
pub fn plan(chains: &[Chain], directory: &Path, here: &impl Here) -> (Plan, Vec<String>) {
    let mut planning = Planning {
        chains,
        directory,
        here,
        stays: BTreeMap::new(),
        plan: Plan::default(),
        problems: Vec::new(),
    };
    planning.find_what_stays();
    for chain in chains.iter().filter(|chain| chain.moves) {
        planning.items(chain);
    }
    for chain in chains.iter().filter(|chain| chain.moves) {
        planning.headers(chain);
    }
    let Planning {
        stays,
        mut plan,
        problems,
        ..
    } = planning;
    let of_these = |path: &PathBuf| {
        let moving = chains.iter().filter(|chain| chain.moves);
        let mut files = moving.flat_map(|chain| chain.layers.iter().flat_map(Layer::files));
        files.any(|file| here.real(&file) == *path)
    };
    let stays = stays.into_iter().filter(|(real, _)| of_these(real));
    plan.stays = stays.map(|(_, kept)| kept).collect();
    (plan, problems)
}

struct Planning<'a, H> {
    chains: &'a [Chain],
    directory: &'a Path,
    here: &'a H,
    /// By what they are.
    stays: BTreeMap<PathBuf, Kept>,
    plan: Plan,
    problems: Vec<String>,
}

impl<H: Here> Planning<'_, H> {
    /// Why a file, of the layer of this number, stays by itself.
    fn reason(&self, path: &Path, number: usize) -> Option<String> {
        match path {
            path if !self.here.is_file(path) => Some("it is no file, and only files are moved".into()),
            path if self.here.is_in(path, self.directory) => Some("it is there already".into()),
            // What a guest writes to is its own.
            path => self
                .here
                .user(path)
                .or_else(|| (number > 0 && self.here.is_shared(path)).then(|| OTHER_HOSTS.into())),
        }
    }

    /// What stays makes what it names stay, also for other disks: until nothing more does.
    fn find_what_stays(&mut self) {
        loop {
            let before = self.stays.len();
            for chain in self.chains {
                let mut above =
                    (!chain.moves).then(|| format!("disk {}, which stays, needs it", chain.target));
                for (number, layer) in chain.layers.iter().enumerate() {
                    let path = plain(&layer.path);
                    let reason = self.why_stays(&path);
                    let reason = reason
                        .or_else(|| above.clone())
                        .or_else(|| self.reason(&path, number));
                    let Some(reason) = reason else { continue };
                    above = above.or_else(|| Some(format!("{}, which stays, needs it", path.display())));
                    if let Some(data) = &layer.data_file {
                        self.stay(plain(&Layer::beside(&layer.path, data)), reason.clone());
                    }
                    self.stay(path, reason);
                }
            }
            if self.stays.len() == before {
                return;
            }
        }
    }

    fn stay(&mut self, path: PathBuf, reason: String) {
        let real = self.here.real(&path);
        self.stays.entry(real).or_insert(Kept { path, reason });
    }

    fn why_stays(&self, path: &Path) -> Option<String> {
        let kept = self.stays.get(&self.here.real(path));
        kept.map(|kept| kept.reason.clone())
    }

    fn place(&self, path: &Path) -> Option<PathBuf> {
        self.plan.place(&self.here.real(path)).cloned()
    }

    fn items(&mut self, chain: &Chain) {
        let target = &chain.target;
        for (number, layer) in chain.layers.iter().enumerate() {
            let path = plain(&layer.path);
            if let Some(reason) = self.why_stays(&path) {
                if number == 0 && !self.here.is_in(&path, self.directory) {
                    self.problems
                        .push(format!("disk {target}: {} cannot move: {reason}", path.display()));
                }
                return;
            }
            let above = number.checked_sub(1).and_then(|above| chain.layers.get(above));
            let part = Part::Disk {
                target: target.clone(),
                layer: number as u16,
                format: layer.format.clone(),
                relative: above
                    .and_then(|above| above.backing.as_ref())
                    .is_some_and(|named| named.is_relative()),
            };
            self.item(path, part);
            if let Some(named) = &layer.data_file {
                self.data(target, number as u16, layer, named);
            }
        }
    }

    /// An image's data file goes along. Its header cannot be told another name: the name must still be right then.
    fn data(&mut self, target: &str, number: u16, layer: &Layer, named: &Path) {
        let path = plain(&Layer::beside(&layer.path, named));
        let stays = self.why_stays(&path);
        if let Some(reason) = stays.or_else(|| self.reason(&path, usize::from(number))) {
            if named.is_relative() {
                self.problems.push(format!(
                    "disk {target}: {} names its data file {} relative to itself, and that cannot move: {reason}",
                    layer.path.display(),
                    named.display()
                ));
            }
            self.stay(path, reason);
            return;
        }
        let is_beside = named.file_name() == Some(named.as_os_str());
        if !is_beside {
            self.problems.push(format!(
                "disk {target}: {image} names its data file {}, which would be wrong in {}: put both into one directory, and \
                 have the image name it without any (qemu-img amend -f {format} -o data_file=NAME {image})",
                named.display(),
                self.directory.display(),
                image = layer.path.display(),
                format = layer.format,
            ));
            return;
        }
        let part = Part::Data {
            target: target.to_owned(),
            layer: number,
            relative: true,
        };
        self.item(path, part);
    }

    /// Adds a file, once.
    fn item(&mut self, path: PathBuf, part: Part) {
        if self.place(&path).is_some() {
            return;
        }
        let Some(name) = path.file_name() else {
            return self.problems.push(format!("{} has no name", path.display()));
        };
        let place = self.directory.join(name);
        let taken = self.plan.places.iter().position(|other| *other == place);
        if let Some(other) = taken {
            self.problems.push(format!(
                "{} and {} would have one name in {}: move their disks to different directories (--disk)",
                self.plan.items[other].path.display(),
                path.display(),
                self.directory.display()
            ));
        }
        self.plan.reals.push(self.here.real(&path));
        self.plan.items.push(Item { path, part });
        self.plan.places.push(place);
    }

    /// Every image that moves must name its backing file where that is then.
    fn headers(&mut self, chain: &Chain) {
        for (layer, below) in chain.layers.iter().zip(chain.layers.iter().skip(1)) {
            let (Some(image), Some(named)) = (self.place(&layer.path), &layer.backing) else {
                continue;
            };
            let moved = self.place(&below.path);
            let backing = moved.clone().unwrap_or_else(|| plain(&below.path));
            // As QEMU will find it from there.
            if self.here.real(&Layer::beside(&image, named)) == self.here.real(&backing)
                || self.plan.renames.iter().any(|known| known.image == image)
            {
                continue;
            }
            let shown = format!(
                "disk {}: {} names its backing file {}",
                chain.target,
                layer.path.display(),
                named.display()
            );
            if !matches!(layer.format.as_str(), "qcow2" | "qed") {
                self.problems.push(format!(
                    "{shown}, and the header of a {} image cannot be told another name",
                    layer.format
                ));
                continue;
            }
            if layer.encrypted {
                self.problems.push(format!(
                    "{shown}, and the header of an encrypted image cannot be told another name"
                ));
                continue;
            }
            match name(named, &backing, moved.is_some()) {
                Some(backing) => self.plan.renames.push(Rename {
                    image,
                    format: layer.format.clone(),
                    backing,
                    backing_format: below.format.clone(),
                }),
                None => self
                    .problems
                    .push(format!("{shown}: its new name cannot be written")),
            }
        }
    }
}

/// How a header that had this name is to name its backing file: as it did, relative to itself where both move.
fn name(named: &Path, backing: &Path, moved: bool) -> Option<String> {
    let beside = backing.file_name().filter(|_| moved && named.is_relative());
    // QEMU takes what stands before a colon for a protocol.
    let beside = beside
        .and_then(|name| name.to_str())
        .filter(|name| !name.contains(':'));
    beside.or_else(|| backing.to_str()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Component;

    /// A host on which these are in use by another guest; what begins with `/dev` is no file, with `/nfs` other hosts' too;
    /// `/link` leads to `/far/a`.
    struct Host(&'static [&'static str]);

    impl Here for Host {
        fn is_file(&self, path: &Path) -> bool {
            !path.starts_with("/dev")
        }
        fn is_in(&self, path: &Path, directory: &Path) -> bool {
            path.parent() == Some(directory)
        }
        fn user(&self, path: &Path) -> Option<String> {
            let used = self.0.iter().any(|used| Path::new(used) == path);
            used.then(|| "guest web refers to it".into())
        }
        fn is_shared(&self, path: &Path) -> bool {
            path.starts_with("/nfs")
        }
        fn real(&self, path: &Path) -> PathBuf {
            let mut real = PathBuf::new();
            for component in path.components() {
                match component {
                    Component::ParentDir => drop(real.pop()),
                    other => real.push(other),
                }
                if real == Path::new("/link") {
                    real = "/far/a".into();
                }
            }
            real
        }
    }

    /// An image, what it names as its backing file, and as its data file.
    type Image = (&'static str, Option<&'static str>, Option<&'static str>);

    fn chain(target: &str, moves: bool, images: &[Image]) -> Chain {
        let layer = |(path, backing, data): &Image| Layer {
            path: path.into(),
            format: if path.ends_with("raw") { "raw" } else { "qcow2" }.into(),
            backing: backing.map(PathBuf::from),
            data_file: data.map(PathBuf::from),
            encrypted: path.contains("secret"),
        };
        Chain {
            target: target.into(),
            layers: images.iter().map(layer).collect(),
            moves,
        }
    }

    fn planned(chains: &[Chain], used: &'static [&'static str]) -> Result<Plan, Vec<String>> {
        match plan(chains, Path::new("/new"), &Host(used)) {
            (plan, problems) if problems.is_empty() => Ok(plan),
            (_, problems) => Err(problems),
        }
    }

    fn moves(plan: &Plan) -> Vec<(&str, &str)> {
        let pairs = plan.items.iter().zip(&plan.places);
        let text = |path: &'_ PathBuf| path.to_str().unwrap().to_owned().leak() as &str;
        pairs
            .map(|(item, place)| (text(&item.path), text(place)))
            .collect()
    }

    fn renames(plan: &Plan) -> Vec<(&str, &str, &str)> {
        let renames = plan.renames.iter();
        renames
            .map(|one| {
                (
                    one.image.to_str().unwrap(),
                    one.backing.as_str(),
                    one.backing_format.as_str(),
                )
            })
            .collect()
    }

    fn stays(plan: &Plan) -> Vec<&str> {
        plan.stays
            .iter()
            .map(|kept| kept.path.to_str().unwrap())
            .collect()
    }

    #[test]
    fn a_chain_moves_whole_and_its_headers_stay_right() {
        let chains = [chain(
            "vda",
            true,
            &[
                ("/a/top.qcow2", Some("mid.qcow2"), None),
                ("/a/mid.qcow2", Some("/b/low.qcow2"), None),
                ("/b/low.qcow2", Some("../c/base.raw"), Some("low.data")),
                ("/b/../c/base.raw", None, None),
            ],
        )];
        let plan = planned(&chains, &[]).unwrap();
        assert_eq!(
            moves(&plan),
            [
                ("/a/top.qcow2", "/new/top.qcow2"),
                ("/a/mid.qcow2", "/new/mid.qcow2"),
                ("/b/low.qcow2", "/new/low.qcow2"),
                ("/b/low.data", "/new/low.data"),
                ("/c/base.raw", "/new/base.raw"),
            ]
        );
        assert_eq!(
            renames(&plan),
            [
                ("/new/mid.qcow2", "/new/low.qcow2", "qcow2"),
                ("/new/low.qcow2", "base.raw", "raw"),
            ]
        );
        assert!(plan.stays.is_empty());
    }

    #[test]
    fn what_others_need_stays_with_all_below_it() {
        let images: &[Image] = &[
            ("/a/top.qcow2", Some("mid.qcow2"), None),
            ("/a/mid.qcow2", Some("base.raw"), None),
            ("/a/base.raw", None, None),
        ];
        let plan = planned(&[chain("vda", true, images)], &["/a/mid.qcow2"]).unwrap();
        assert_eq!(moves(&plan), [("/a/top.qcow2", "/new/top.qcow2")]);
        assert_eq!(renames(&plan), [("/new/top.qcow2", "/a/mid.qcow2", "qcow2")]);
        assert_eq!(stays(&plan), ["/a/base.raw", "/a/mid.qcow2"]);
        // What the guest writes to is nobody else's.
        let problems = planned(&[chain("vda", true, images)], &["/a/top.qcow2"]).unwrap_err();
        assert!(problems[0].contains("guest web"), "{problems:?}");
        // A disk of its own that stays is as good as another guest.
        let other = chain(
            "vdb",
            false,
            &[
                ("/b/x.qcow2", Some("/a/base.raw"), None),
                ("/a/base.raw", None, None),
            ],
        );
        let plan = planned(&[chain("vda", true, images), other], &[]).unwrap();
        assert_eq!(moves(&plan).len(), 2);
        assert_eq!(renames(&plan), [("/new/mid.qcow2", "/a/base.raw", "raw")]);
        assert_eq!(stays(&plan), ["/a/base.raw"]);
    }

    #[test]
    fn a_base_that_other_hosts_see_stays() {
        let images: &[Image] = &[
            ("/nfs/top.qcow2", Some("mid.qcow2"), None),
            ("/nfs/mid.qcow2", Some("../local/base.raw"), Some("mid.data")),
            ("/local/base.raw", None, None),
        ];
        let plan = planned(&[chain("vda", true, images)], &[]).unwrap();
        assert_eq!(moves(&plan), [("/nfs/top.qcow2", "/new/top.qcow2")]);
        assert_eq!(renames(&plan), [("/new/top.qcow2", "/nfs/mid.qcow2", "qcow2")]);
        assert_eq!(
            stays(&plan),
            ["/local/base.raw", "/nfs/mid.data", "/nfs/mid.qcow2"]
        );
        assert!(plan.stays[2].reason.contains("network file system"));
        // The data alone: its image names it where it is.
        let images: &[Image] = &[
            ("/a/top.qcow2", Some("mid.qcow2"), None),
            ("/a/mid.qcow2", None, Some("/nfs/mid.data")),
        ];
        let plan = planned(&[chain("vda", true, images)], &[]).unwrap();
        assert_eq!((moves(&plan).len(), stays(&plan)), (2, vec!["/nfs/mid.data"]));
    }

    #[test]
    fn a_base_of_two_disks_moves_once_or_not_at_all() {
        let base: Image = ("/a/base.raw", None, None);
        let one = chain("vda", true, &[("/a/one.qcow2", Some("base.raw"), None), base]);
        let two = chain("vdb", true, &[("/b/two.qcow2", Some("/a/base.raw"), None), base]);
        let plan = planned(&[one.clone(), two], &[]).unwrap();
        assert_eq!(moves(&plan).len(), 3);
        assert_eq!(renames(&plan), [("/new/two.qcow2", "/new/base.raw", "raw")]);
        // The second disk is there already, and its header is not touched.
        let there = chain(
            "vdb",
            true,
            &[("/new/two.qcow2", Some("/a/base.raw"), None), base],
        );
        let plan = planned(&[one, there], &[]).unwrap();
        assert_eq!(moves(&plan), [("/a/one.qcow2", "/new/one.qcow2")]);
        assert_eq!(renames(&plan), [("/new/one.qcow2", "/a/base.raw", "raw")]);
        assert_eq!(stays(&plan), ["/a/base.raw", "/new/two.qcow2"]);
    }

    #[test]
    fn a_file_is_one_by_all_of_its_names() {
        let own = chain(
            "vda",
            true,
            &[("/link/x", Some("base"), None), ("/link/base", None, None)],
        );
        let (plan, problems) = plan(std::slice::from_ref(&own), Path::new("/new"), &Host(&[]));
        assert_eq!(problems, [""; 0]);
        for (path, place) in [
            ("/link/x", Some("/new/x")),
            ("/far/a/x", Some("/new/x")),
            ("/link/../a/x", Some("/new/x")),
            ("/link/../x", None),
            ("/x", None),
        ] {
            let found = plan.place(&Host(&[]).real(Path::new(path)));
            assert_eq!(found.map(PathBuf::as_path), place.map(Path::new), "{path}");
        }
        // By the other name it is a disk's that stays, and by a third one another's that moves, too.
        let other = |moves| {
            chain(
                "vdb",
                moves,
                &[("/b/y", Some("/far/a/base"), None), ("/far/a/base", None, None)],
            )
        };
        let stays = planned(&[own.clone(), other(false)], &[]).unwrap();
        assert_eq!(moves(&stays), [("/link/x", "/new/x")]);
        let both = planned(&[own, other(true)], &[]).unwrap();
        let expected = [
            ("/link/x", "/new/x"),
            ("/link/base", "/new/base"),
            ("/b/y", "/new/y"),
        ];
        assert_eq!(moves(&both), expected);
        assert_eq!(renames(&both), [("/new/y", "/new/base", "qcow2")]);
    }

    #[test]
    fn from_behind_a_symlink_a_header_finds_another_file() {
        let images: &[Image] = &[("/a/x", Some("../b/base"), None), ("/b/base", None, None)];
        let (plan, problems) = plan(
            &[chain("vda", true, images)],
            Path::new("/link"),
            &Host(&["/b/base"]),
        );
        // By its text, /link/../b/base would still be the base.
        assert_eq!(
            (problems, renames(&plan)),
            (Vec::new(), vec![("/link/x", "/b/base", "qcow2")])
        );
    }

    #[test]
    fn what_cannot_be_kept_right_is_refused() {
        let refused = |images: &[Image], word: &str| {
            let problems = planned(&[chain("vda", true, images)], &["/used"]).unwrap_err();
            assert!(
                problems.iter().any(|problem| problem.contains(word)),
                "{word}: {problems:?}"
            );
        };
        refused(&[("/a/x.qcow2", None, Some("/a/x.data"))], "data_file=NAME");
        refused(&[("/a/x.qcow2", None, Some("d/x.data"))], "data_file=NAME");
        refused(
            &[("/a/x.qcow2", None, Some("../dev/volume"))],
            "relative to itself",
        );
        refused(&[("/dev/volume", None, None)], "no file");
        refused(&[("/a/x", Some("/b/x"), None), ("/b/x", None, None)], "one name");
        refused(
            &[("/a/secret", Some("/b/y"), None), ("/b/y", None, None)],
            "encrypted",
        );
        // A device that an image names by its path may stay.
        let image: Image = ("/a/x.qcow2", None, Some("/dev/volume"));
        assert_eq!(
            moves(&planned(&[chain("vda", true, &[image])], &[]).unwrap()).len(),
            1
        );
    }

    #[test]
    fn names_stay_as_they_were_where_they_can() {
        let of =
            |named: &str, backing: &str, moved| name(Path::new(named), Path::new(backing), moved).unwrap();
        assert_eq!(of("x", "/new/y", true), "y");
        assert_eq!(of("x", "/a/y", false), "/a/y");
        assert_eq!(of("/a/x", "/new/y", true), "/new/y");
        assert_eq!(of("x", "/new/a:y", true), "/new/a:y");
    }
}
