//! A disk's layers: what `qemu-img` finds in the images' headers. It is bounded in time and output, and runs without any
//! lock held; what it says is read by a pure parser.

use ferry_host as host;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Headers of a long chain on a slow network file system.
const LIMIT: Duration = Duration::from_secs(60);
/// Layers of one chain, as in libvirt 11.3 (`virStorageSourceGetMetadata`).
const MAX_LAYERS: usize = 200;

/// One layer of a disk, the top one first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its file, as `qemu-img` opened it.
    pub path: PathBuf,
    /// Its format.
    pub format: String,
    /// The layer below, as its header has it.
    pub backing: Option<PathBuf>,
    /// The file that holds its data, as its header has it.
    pub data_file: Option<PathBuf>,
    /// Nobody opens it without a secret.
    pub encrypted: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    filename: String,
    format: String,
    backing_filename: Option<String>,
    backing_filename_format: Option<String>,
    #[serde(default)]
    encrypted: bool,
    format_specific: Option<Specific>,
}

#[derive(Deserialize)]
struct Specific {
    data: Option<SpecificData>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct SpecificData {
    data_file: Option<String>,
}

/// The layers of the image at this path, which is of this format; the header of a raw one is the guest's business.
pub fn layers(path: &Path, format: &str) -> Result<Vec<Layer>, String> {
    if format == "raw" {
        return Ok(vec![Layer {
            path: path.to_owned(),
            format: "raw".into(),
            backing: None,
            data_file: None,
            encrypted: false,
        }]);
    }
    let answer = ask(path, format)?;
    read(&answer).map_err(|why| format!("{}: {why}", path.display()))
}

fn ask(path: &Path, format: &str) -> Result<Vec<u8>, String> {
    let mut info = Command::new("qemu-img");
    info.args(["info", "--force-share", "--backing-chain", "--output=json"])
        .args(["-f", format])
        // An option it is not, nor a protocol of QEMU's.
        .arg("--")
        .arg(path);
    host::run(&mut info, LIMIT).map_err(|why| format!("qemu-img cannot look at {}: {why}", path.display()))
}

/// The layers in what `qemu-img info --backing-chain --output=json` says.
fn read(answer: &[u8]) -> Result<Vec<Layer>, String> {
    let chain: Vec<Info> = serde_json::from_slice(answer)
        .map_err(|error| format!("qemu-img's answer cannot be read: {error}"))?;
    if chain.is_empty() || chain.len() > MAX_LAYERS {
        return Err(format!("{} layers, not 1 to {MAX_LAYERS}", chain.len()));
    }
    chain.into_iter().map(Layer::read).collect()
}

impl Layer {
    fn read(info: Info) -> Result<Self, String> {
        let local = |name: String| match is_local(&name) {
            true => Ok(PathBuf::from(name)),
            false => Err(format!(
                "its layer or data file {name} is not a file of this host"
            )),
        };
        if info.backing_filename.is_some() && info.backing_filename_format.is_none() {
            // Guessing is what lets a guest's raw disk name any file of the host's; libvirt refuses it too.
            return Err(format!(
                "{} does not say of what format its backing file is: qemu-img rebase -u -F FORMAT",
                info.filename
            ));
        }
        let data_file = info.format_specific.and_then(|specific| specific.data?.data_file);
        Ok(Self {
            path: local(info.filename)?,
            format: info.format,
            backing: info.backing_filename.map(local).transpose()?,
            data_file: data_file.map(local).transpose()?,
            encrypted: info.encrypted,
        })
    }

    /// Its file, and that of its data.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> + '_ {
        let data = self.data_file.iter();
        std::iter::once(self.path.clone()).chain(data.map(|data| Self::beside(&self.path, data)))
    }

    /// A file that its header names, when the layer itself is in this place.
    pub fn beside(place: &Path, named: &Path) -> PathBuf {
        match place.parent() {
            // An absolute name replaces all of it.
            Some(directory) => directory.join(named),
            None => named.to_owned(),
        }
    }
}

/// Whether QEMU takes a name for a file's path: no protocol (`nbd:`, `json:`) before the first slash.
fn is_local(name: &str) -> bool {
    let first = name.split('/').next().unwrap_or("");
    !name.is_empty() && !first.contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 10.0 wrote it, but for what is of no interest here.
    const CHAIN: &str = r#"[
      {"children": [{"name": "file", "info": {"children": [], "virtual-size": 328192, "filename": "/a/top.qcow2",
         "format": "file", "actual-size": 208896, "format-specific": {"type": "file", "data": {}}, "dirty-flag": false}}],
       "backing-filename-format": "qcow2", "snapshots": [{"icount": 0, "vm-clock-nsec": 0, "name": "s1", "date-sec": 1,
         "date-nsec": 2, "vm-clock-sec": 0, "id": "1", "vm-state-size": 0}],
       "virtual-size": 16777216, "filename": "/a/top.qcow2", "cluster-size": 65536, "format": "qcow2", "actual-size": 208896,
       "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "compression-type": "zlib", "refcount-bits": 16,
         "data-file": "top.data", "data-file-raw": true, "corrupt": false, "extended-l2": false}},
       "full-backing-filename": "/a/mid.qcow2", "backing-filename": "mid.qcow2", "dirty-flag": false},
      {"virtual-size": 16777216, "filename": "/a/mid.qcow2", "format": "qcow2", "actual-size": 200704,
       "format-specific": {"type": "qcow2", "data": {"compat": "1.1"}}, "backing-filename-format": "raw",
       "full-backing-filename": "/b/base.raw", "backing-filename": "/b/base.raw", "dirty-flag": false},
      {"virtual-size": 16777216, "filename": "/b/base.raw", "format": "raw", "actual-size": 4096, "dirty-flag": false}]"#;

    #[test]
    fn a_chain_is_read_from_the_top() {
        let layers = read(CHAIN.as_bytes()).unwrap();
        let paths: Vec<_> = layers.iter().map(|layer| layer.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/a/top.qcow2", "/a/mid.qcow2", "/b/base.raw"]);
        assert_eq!(layers[0].data_file, Some("top.data".into()));
        assert_eq!(layers[0].backing, Some("mid.qcow2".into()));
        assert_eq!((layers[2].format.as_str(), &layers[2].backing), ("raw", &None));
    }

    #[test]
    fn names_follow_their_layer() {
        let beside = |place: &str, named: &str| Layer::beside(Path::new(place), Path::new(named));
        assert_eq!(beside("/x/top", "mid"), Path::new("/x/mid"));
        assert_eq!(beside("/x/top", "/a/mid"), Path::new("/a/mid"));
    }

    #[test]
    fn what_is_not_certain_is_refused() {
        let guessed = CHAIN.replace(r#""backing-filename-format": "raw","#, "");
        assert!(read(guessed.as_bytes()).unwrap_err().contains("rebase -u -F"));
        for (from, to) in [
            (
                r#""backing-filename": "/b/base.raw""#,
                r#""backing-filename": "nbd://host/x""#,
            ),
            (r#""data-file": "top.data""#, r#""data-file": "json:{}""#),
        ] {
            let odd = CHAIN.replace(from, to);
            assert!(
                read(odd.as_bytes())
                    .unwrap_err()
                    .contains("not a file of this host"),
                "{to}"
            );
        }
        for answer in ["", "[]", "{}", "[{}]"] {
            assert!(read(answer.as_bytes()).is_err(), "{answer}");
        }
    }

    #[test]
    fn a_raw_disk_is_not_looked_into() {
        let layers = layers(Path::new("/no/such/disk"), "raw").unwrap();
        assert_eq!((layers.len(), layers[0].format.as_str()), (1, "raw"));
    }
}
