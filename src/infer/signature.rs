//! Who has made it: ed25519 (RFC 8032) over the one file that pins all others, for model packages and updates alike.

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

/// What is wrong with a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// It is neither 64 bytes nor their hexadecimal digits.
    Form,
    /// It is not of this text and this key.
    Wrong,
}

/// Reads a public key of 64 hexadecimal digits.
///
/// # Errors
/// A sentence when the text is no such key.
pub fn public_key(text: &str) -> Result<VerifyingKey, String> {
    let bytes = unhex::<32>(text.trim())
        .ok_or_else(|| format!("not an ed25519 public key of 64 hexadecimal digits: {text:?}"))?;
    VerifyingKey::from_bytes(&bytes).map_err(|e| format!("not an ed25519 public key: {e}"))
}

/// Checks a signature, 64 bytes or 128 hexadecimal digits, over `text`.
///
/// # Errors
/// [`Flaw`]
pub fn verify(key: &VerifyingKey, text: &[u8], signature: &[u8]) -> Result<(), Flaw> {
    let bytes: [u8; 64] = match signature.try_into() {
        Ok(raw) => raw,
        Err(_) => std::str::from_utf8(signature).ok().and_then(|text| unhex(text.trim())).ok_or(Flaw::Form)?,
    };
    key.verify_strict(text, &Signature::from_bytes(&bytes)).map_err(|_| Flaw::Wrong)
}

/// The private half: 32 bytes that never leave the maker's machine.
pub struct PrivateKey(SigningKey);

impl PrivateKey {
    /// The key of these 32 bytes, which somebody has drawn at random.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(SigningKey::from_bytes(&seed))
    }

    /// Reads 64 hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        Some(Self::from_seed(unhex(text.trim())?))
    }

    /// As [`PrivateKey::parse`] reads it.
    pub fn to_hex(&self) -> String {
        hex(&self.0.to_bytes())
    }

    /// The public half, as [`public_key`] reads it.
    pub fn public_hex(&self) -> String {
        hex(&self.0.verifying_key().to_bytes())
    }

    /// Signs.
    pub fn sign(&self, text: &[u8]) -> [u8; 64] {
        self.0.sign(text).to_bytes()
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut out = [0; N];
    // `from_str_radix` alone would take a plus sign for a digit.
    if text.len() != 2 * N || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_text_with_this_key_is_signed() {
        let key = PrivateKey::parse(&PrivateKey::from_seed([7; 32]).to_hex()).unwrap();
        let public = public_key(&key.public_hex()).unwrap();
        let signature = key.sign(b"text");
        assert_eq!(verify(&public, b"text", &signature), Ok(()));
        assert_eq!(verify(&public, b"text", format!("{}\n", hex(&signature)).as_bytes()), Ok(()));
        assert_eq!(verify(&public, b"tex", &signature), Err(Flaw::Wrong));
        assert_eq!(verify(&public, b"text", &signature[1..]), Err(Flaw::Form));
        let other = public_key(&PrivateKey::from_seed([8; 32]).public_hex()).unwrap();
        assert_eq!(verify(&other, b"text", &signature), Err(Flaw::Wrong));
        assert!(PrivateKey::parse(&format!("+{}", &key.to_hex()[1..])).is_none(), "a sign is no digit");
    }
}
