//! Transfer syntaxes this box reads (PS3.5 chapter 10), and what each means for elements and pixels.

use super::elements::Encoding;

/// How pixels are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// As they are.
    Native,
    /// Run lengths (PS3.5 annex G).
    Rle,
    /// JPEG baseline, extended or lossless (ITU-T T.81).
    Jpeg,
    /// JPEG-LS (ITU-T T.87).
    JpegLs,
    /// JPEG 2000 (ITU-T T.800).
    Jpeg2000,
}

/// A transfer syntax that can be decoded here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransferSyntax {
    /// Its UID.
    pub uid: &'static str,
    /// Its name in PS3.6.
    pub name: &'static str,
    /// How pixels are packed.
    pub codec: Codec,
    /// The whole data set is deflated (PS3.5 A.5).
    pub deflated: bool,
    pub(super) encoding: Encoding,
}

const fn syntax(uid: &'static str, name: &'static str, codec: Codec, encoding: Encoding) -> TransferSyntax {
    TransferSyntax { uid, name, codec, deflated: false, encoding }
}

const EXPLICIT: Encoding = Encoding::EXPLICIT;

/// Every transfer syntax that can be decoded, the ones an association should prefer first: uncompressed, then lossless.
const DECODABLE: [TransferSyntax; 14] = [
    syntax("1.2.840.10008.1.2.1", "Explicit VR Little Endian", Codec::Native, EXPLICIT),
    syntax("1.2.840.10008.1.2", "Implicit VR Little Endian", Codec::Native, Encoding::IMPLICIT),
    syntax("1.2.840.10008.1.2.2", "Explicit VR Big Endian", Codec::Native, Encoding::EXPLICIT_BIG),
    TransferSyntax {
        deflated: true,
        ..syntax("1.2.840.10008.1.2.1.99", "Deflated Explicit VR Little Endian", Codec::Native, EXPLICIT)
    },
    syntax("1.2.840.10008.1.2.5", "RLE Lossless", Codec::Rle, EXPLICIT),
    syntax("1.2.840.10008.1.2.4.80", "JPEG-LS Lossless", Codec::JpegLs, EXPLICIT),
    syntax("1.2.840.10008.1.2.4.70", "JPEG Lossless, First-Order Prediction", Codec::Jpeg, EXPLICIT),
    syntax("1.2.840.10008.1.2.4.57", "JPEG Lossless", Codec::Jpeg, EXPLICIT),
    syntax("1.2.840.10008.1.2.4.90", "JPEG 2000 Lossless", Codec::Jpeg2000, EXPLICIT),
    syntax("1.2.840.10008.1.2.4.81", "JPEG-LS Near-lossless", Codec::JpegLs, EXPLICIT),
    syntax("1.2.840.10008.1.2.4.91", "JPEG 2000", Codec::Jpeg2000, EXPLICIT),
    syntax("1.2.840.10008.1.2.4.50", "JPEG Baseline", Codec::Jpeg, EXPLICIT),
    syntax("1.2.840.10008.1.2.4.51", "JPEG Extended", Codec::Jpeg, EXPLICIT),
    // Encapsulated Uncompressed (PS3.5 A.4.11): fragments of plain pixels.
    syntax("1.2.840.10008.1.2.1.98", "Encapsulated Uncompressed Explicit VR Little Endian", Codec::Native, EXPLICIT),
];

/// Every transfer syntax whose pixels can be decoded, in the order an association should prefer them.
pub fn decodable_transfer_syntaxes() -> &'static [TransferSyntax] {
    &DECODABLE
}

impl TransferSyntax {
    /// The syntax with this UID, or None when it cannot be decoded here.
    pub fn find(uid: &str) -> Option<&'static Self> {
        let uid = uid.trim_end_matches(['\0', ' ']);
        DECODABLE.iter().find(|s| s.uid == uid)
    }

    pub(super) fn of_encoding(encoding: Encoding) -> &'static Self {
        DECODABLE.iter().find(|s| s.encoding == encoding).expect("the first three cover all encodings")
    }
}
