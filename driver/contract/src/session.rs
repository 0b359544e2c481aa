//! What identifies and protects one migration: its session id, its secret, its encryption.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The version of the cookie element and of the engines' wire, which change together. Hosts whose versions
/// differ use libvirt's own migration.
pub const VERSION: u16 = 1;

/// A page as the engine tracks and moves it: 4 KiB, also in huge pages.
pub const PAGE: u64 = 4096;

/// The secret that proves that a connection belongs to this migration. It travels in libvirt's cookie only.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token([u8; Token::LENGTH]);

impl Token {
    /// Bytes of a token.
    pub const LENGTH: usize = 32;

    /// A token of these random bytes.
    pub fn new(bytes: [u8; Self::LENGTH]) -> Self {
        Self(bytes)
    }

    /// The secret itself.
    pub fn bytes(&self) -> &[u8; Self::LENGTH] {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl From<Token> for String {
    fn from(token: Token) -> Self {
        token.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A token that is not 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a session token is not {} hexadecimal digits", 2 * Token::LENGTH)]
pub struct MalformedToken;

impl TryFrom<String> for Token {
    type Error = MalformedToken;

    fn try_from(text: String) -> Result<Self, MalformedToken> {
        text.parse()
    }
}

impl FromStr for Token {
    type Err = MalformedToken;

    fn from_str(text: &str) -> Result<Self, MalformedToken> {
        let digits = text.as_bytes();
        if digits.len() != 2 * Self::LENGTH {
            return Err(MalformedToken);
        }
        let mut bytes = [0; Self::LENGTH];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

pub(crate) fn nibble(digit: u8) -> Result<u8, MalformedToken> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        _ => Err(MalformedToken),
    }
}

/// Whether the engines encrypt what they send each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encryption {
    /// TLS 1.3, with a certificate made for this one session on each side and pinned by the cookies.
    #[default]
    Always,
    /// Plain TCP: the guest's memory is readable on the network between the hosts.
    Never,
    /// TLS 1.3 with libvirt's own certificates, as its migrations with TLS use them: what one migration asks for
    /// (`virsh migrate --tls`), no host's configuration.
    Certificates,
}

impl Encryption {
    /// What holds where the two hosts want this and that. Certificates are asked for in one call that goes to both
    /// hosts: `None` where only one has heard of them.
    pub fn agreed(self, other: Self) -> Option<Self> {
        match (self, other) {
            (Self::Certificates, Self::Certificates) => Some(Self::Certificates),
            (Self::Certificates, _) | (_, Self::Certificates) => None,
            (Self::Never, Self::Never) => Some(Self::Never),
            (Self::Always, _) | (_, Self::Always) => Some(Self::Always),
        }
    }
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Always => "always",
            Self::Never => "never",
            Self::Certificates => "certificates",
        })
    }
}

/// The guest a session is about, as people and libvirt name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// libvirt's name of the domain on this host.
    pub name: String,
    /// libvirt's UUID of the domain.
    pub uuid: uuid::Uuid,
}

/// One RAM block of the guest that the engines move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// QEMU's name of the block (`idstr`), the same on both hosts: `pc.ram`, `ram-node0`.
    pub name: String,
    /// Bytes of the block, a multiple of [`PAGE`].
    pub size: u64,
    /// Bytes that are resident on the source; the destination reserves that much.
    pub resident: u64,
    /// Bytes of the pages it is made of on the source: [`PAGE`], or a huge page's (hugetlbfs).
    pub page: u64,
}

impl Block {
    /// Whether it is made of huge pages that the host keeps apart from all other memory.
    pub fn is_huge(&self) -> bool {
        self.page > PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text() {
        let token = Token::new(std::array::from_fn(|index| (index * 7) as u8));
        assert_eq!(String::from(token.clone()).parse(), Ok(token));
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "00",
            &"g".repeat(64),
            &"0".repeat(63),
            &"0".repeat(65),
            &"é".repeat(32),
        ] {
            assert_eq!(text.parse::<Token>(), Err(MalformedToken), "{text}");
        }
    }

    #[test]
    fn a_token_never_shows_in_a_log() {
        assert_eq!(format!("{:?}", Token::new([7; 32])), "Token(…)");
    }
}
