//! Storage pools on either host: where a volume is, and that libvirt sees what came and went.

use super::definition::Source;
use crate::libvirt::{Connection, Pool, Storage};
use roxmltree::Document;
use std::path::{Path, PathBuf};

/// What kind of pool it is and where its volumes are.
#[derive(Debug, PartialEq, Eq)]
struct Shape {
    kind: String,
    target: PathBuf,
}

impl Shape {
    fn read(xml: &str) -> Option<Self> {
        let document = Document::parse(xml).ok()?;
        let pool = document.root_element();
        let target = pool.children().find(|child| child.has_tag_name("target"))?;
        let path = target.children().find(|child| child.has_tag_name("path"))?;
        Some(Self {
            kind: pool.attribute("type")?.to_owned(),
            target: path.text()?.trim().into(),
        })
    }

    /// Whether its volumes are files of one directory.
    fn is_directory(&self) -> bool {
        matches!(self.kind.as_str(), "dir" | "fs" | "netfs")
    }
}

/// Where the bytes of a disk are: a path, or what a pool says of its volume. One that is yet to come has a path only
/// where the pool is a directory.
///
/// # Errors
/// Why there is no path, in a sentence.
pub fn path_of(connection: Connection, source: &Source) -> Result<Option<PathBuf>, String> {
    let (pool, volume) = match source {
        Source::File(path) | Source::Block(path) => return Ok(Some(path.clone())),
        Source::Volume { pool, volume } => (pool, volume),
        Source::None | Source::Network | Source::Other(_) => return Ok(None),
    };
    let found = active(connection, pool)?;
    if let Ok(path) = found.volume_path(volume) {
        return Ok(Some(path));
    }
    let shape = found.xml().ok().and_then(|xml| Shape::read(&xml));
    let directory = shape.filter(Shape::is_directory).ok_or_else(|| {
        format!("storage pool {pool} has no volume {volume}: virsh vol-create-as {pool} {volume} SIZE")
    })?;
    match volume.contains('/') {
        true => Err(format!(
            "volume {volume} of storage pool {pool} is no file's name"
        )),
        false => Ok(Some(directory.target.join(volume))),
    }
}

fn active(connection: Connection, pool: &str) -> Result<Pool, String> {
    let storage = Storage::of(connection).map_err(|error| format!("no storage driver: {error}"))?;
    let found = storage
        .pool(pool)
        .map_err(|_| format!("storage pool {pool} does not exist: virsh pool-define it"))?;
    match found.is_active() {
        true => Ok(found),
        false => Err(format!(
            "storage pool {pool} is not active: virsh pool-start {pool}"
        )),
    }
}

/// Where the files of a pool's volumes are.
///
/// # Errors
/// Why it has none, in a sentence.
pub fn directory(connection: Connection, pool: &str) -> Result<PathBuf, String> {
    let xml = active(connection, pool)?.xml();
    files(pool, xml.ok().and_then(|xml| Shape::read(&xml)))
}

fn files(pool: &str, shape: Option<Shape>) -> Result<PathBuf, String> {
    match shape {
        Some(shape) if shape.is_directory() => Ok(shape.target),
        other => Err(format!(
            "storage pool {pool} is of type {}, and files go only into one that is a directory (dir, fs, netfs)",
            other.map_or_else(|| "unknown".into(), |shape| shape.kind)
        )),
    }
}

/// Whether this path is, or will be, in an active pool: a file in its directory, or a device among its volumes.
pub fn hold(connection: Connection, path: &Path) -> bool {
    targets(connection).iter().any(|target| has(target, path))
}

/// Everything is below the root, and every disk of the host's in the other.
fn has(target: &Path, path: &Path) -> bool {
    target.parent().is_some() && target != Path::new("/dev") && path.starts_with(target)
}

/// Where the volumes of active pools are.
pub fn targets(connection: Connection) -> Vec<PathBuf> {
    let pools = match Storage::of(connection).and_then(|storage| storage.pools()) {
        Ok(pools) => pools,
        Err(error) => {
            tracing::debug!("no storage pool was looked at: {error}");
            return Vec::new();
        }
    };
    let shapes = pools.iter().filter_map(|pool| Shape::read(&pool.xml().ok()?));
    shapes.map(|shape| shape.target).collect()
}

/// Has every active pool look again in whose directory one of these files came or went.
pub fn refresh<'a>(connection: Connection, files: impl Iterator<Item = &'a Path>) {
    let mut directories: Vec<&Path> = files.filter_map(Path::parent).collect();
    directories.sort();
    directories.dedup();
    let pools = match Storage::of(connection).and_then(|storage| storage.pools()) {
        Ok(pools) => pools,
        Err(error) => return tracing::debug!("no storage pool was refreshed: {error}"),
    };
    let concerned = |pool: &Pool| {
        let shape = pool.xml().ok().and_then(|xml| Shape::read(&xml));
        shape.is_some_and(|shape| {
            shape.is_directory() && directories.iter().any(|directory| same(directory, &shape.target))
        })
    };
    for pool in pools.iter().filter(|pool| concerned(pool)) {
        if let Err(error) = pool.refresh() {
            tracing::warn!("a storage pool was not refreshed: {error}");
        }
    }
}

fn same(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_are_told_apart() {
        let shape = |kind| {
            Shape::read(&format!(
                "<pool type='{kind}'><name>p</name><target><path>/var/lib/x</path></target></pool>"
            ))
            .unwrap()
        };
        assert!(shape("dir").is_directory() && shape("netfs").is_directory());
        assert!(!shape("logical").is_directory());
        assert_eq!(shape("dir").target, Path::new("/var/lib/x"));
        assert_eq!(files("p", Some(shape("fs"))), Ok("/var/lib/x".into()));
        for (refused, kind) in [(Some(shape("logical")), "logical"), (None, "unknown")] {
            let why = files("p", refused).unwrap_err();
            assert!(why.contains(&format!("pool p is of type {kind}")), "{why}");
        }
        let has = |target: &str, path: &str| super::has(Path::new(target), Path::new(path));
        assert!(has("/srv", "/srv/a/b") && has("/dev/vg", "/dev/vg/lv"));
        assert!(!has("/srv", "/srv2") && !has("/", "/etc/shadow") && !has("/dev", "/dev/sdb"));
        assert_eq!(Shape::read("<pool type='rbd'><name>p</name></pool>"), None);
        assert_eq!(Shape::read("<pool"), None);
    }
}
