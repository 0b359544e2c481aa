//! Files that say what must be in them: each is named by its content's digest.

/// The name of a file of this content.
pub fn name_of(content: &[u8]) -> String {
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(content))
}
