//! DIMSE messages (PS3.7): command sets in and out, and the status words of C-STORE.
//!
//! A command set is group 0000 in implicit VR little endian and nothing else (PS3.7 6.3.1), so it is read here by a
//! loop of its own: no nesting, no dictionary, and no length that is believed before it is checked.

use std::collections::BTreeMap;

use crate::study::Uid;

/// Command sets are a few hundred bytes; one that grows past this is an attack or a lost frame.
pub const COMMAND_BYTES_MAX: usize = 16 * 1024;

/// Command Field (0000,0100), PS3.7 E.1.
pub mod field {
    /// C-STORE-RQ.
    pub const STORE: u16 = 0x0001;
    /// C-ECHO-RQ.
    pub const ECHO: u16 = 0x0030;
    /// C-CANCEL-RQ: the one request that has no response.
    pub const CANCEL: u16 = 0x0fff;
    /// The bit that makes a response of a request.
    pub const RESPONSE: u16 = 0x8000;
}

/// Elements of the command group that are used here.
mod element {
    pub const AFFECTED_SOP_CLASS: u16 = 0x0002;
    pub const COMMAND_FIELD: u16 = 0x0100;
    pub const MESSAGE_ID: u16 = 0x0110;
    pub const RESPONDED_TO: u16 = 0x0120;
    pub const PRIORITY: u16 = 0x0700;
    pub const DATA_SET_TYPE: u16 = 0x0800;
    pub const STATUS: u16 = 0x0900;
    pub const ERROR_COMMENT: u16 = 0x0902;
    pub const AFFECTED_SOP_INSTANCE: u16 = 0x1000;
}

/// Command Data Set Type (0000,0800) of a message without data set.
const NO_DATA_SET: u16 = 0x0101;

/// Status (0000,0900) as this program sends it (PS3.7 C, PS3.4 B.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// Done; for C-STORE: safe on disk.
    pub const SUCCESS: Self = Self(0x0000);
    /// No room now; sending it again later may help.
    pub const OUT_OF_RESOURCES: Self = Self(0xA700);
    /// The data set is of another SOP class or instance than announced.
    pub const DOES_NOT_MATCH: Self = Self(0xA900);
    /// The data set cannot be understood or is not wanted; sending it again will not help.
    pub const CANNOT_UNDERSTAND: Self = Self(0xC000);
    /// The SOP class is not the one that was negotiated.
    pub const SOP_CLASS_NOT_SUPPORTED: Self = Self(0x0122);
    /// The SOP Instance UID is no UID.
    pub const INVALID_INSTANCE: Self = Self(0x0117);
    /// A service that is not offered.
    pub const UNRECOGNIZED_OPERATION: Self = Self(0x0211);

    /// Success and the warnings (Bxxx, and 0001, 0107, 0116): the peer has the instance.
    pub fn is_stored(self) -> bool {
        self.0 == 0 || self.0 & 0xf000 == 0xb000 || matches!(self.0, 0x0001 | 0x0107 | 0x0116)
    }
}

/// Why bytes are no command set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCommand {
    /// An element's length runs past the end.
    #[error("the command set ends inside element (0000,{0:04x})")]
    Truncated(u16),
    /// Bytes are left over that hold no element.
    #[error("the command set ends inside an element header")]
    Ragged,
    /// Something other than group 0000.
    #[error("element of group {0:04x} in a command set")]
    ForeignGroup(u16),
    /// A needed element is missing or has the wrong size.
    #[error("the command set lacks a valid element (0000,{0:04x})")]
    Missing(u16),
}

/// A command set: the elements of group 0000.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommandSet {
    elements: BTreeMap<u16, Vec<u8>>,
}

impl CommandSet {
    /// Reads a command set from the joined command fragments of one message.
    ///
    /// # Errors
    /// [`BadCommand`] when the bytes are no well-formed group 0000.
    pub fn parse(mut bytes: &[u8]) -> Result<Self, BadCommand> {
        let mut elements = BTreeMap::new();
        while !bytes.is_empty() {
            let (header, rest) = bytes.split_at_checked(8).ok_or(BadCommand::Ragged)?;
            let group = u16::from_le_bytes([header[0], header[1]]);
            let element = u16::from_le_bytes([header[2], header[3]]);
            let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
            if group != 0 {
                return Err(BadCommand::ForeignGroup(group));
            }
            let (value, rest) = rest.split_at_checked(length).ok_or(BadCommand::Truncated(element))?;
            elements.insert(element, value.to_vec());
            bytes = rest;
        }
        Ok(Self { elements })
    }

    /// The bytes for the wire, group length (0000,0000) first.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(256);
        for (&element, value) in self.elements.iter().filter(|(e, _)| **e != 0) {
            put(&mut body, element, value);
        }
        let mut bytes = Vec::with_capacity(body.len() + 12);
        put(&mut bytes, 0, &(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// C-ECHO-RQ.
    pub fn echo_request(message_id: u16, verification: &str) -> Self {
        Self::default()
            .with_text(element::AFFECTED_SOP_CLASS, verification, 0)
            .with_u16(element::COMMAND_FIELD, field::ECHO)
            .with_u16(element::MESSAGE_ID, message_id)
            .with_u16(element::DATA_SET_TYPE, NO_DATA_SET)
    }

    /// C-STORE-RQ of medium priority; the data set follows.
    pub fn store_request(message_id: u16, sop_class: &Uid, sop_instance: &Uid) -> Self {
        Self::default()
            .with_text(element::AFFECTED_SOP_CLASS, sop_class.as_str(), 0)
            .with_u16(element::COMMAND_FIELD, field::STORE)
            .with_u16(element::MESSAGE_ID, message_id)
            .with_u16(element::PRIORITY, 0)
            .with_u16(element::DATA_SET_TYPE, 1)
            .with_text(element::AFFECTED_SOP_INSTANCE, sop_instance.as_str(), 0)
    }

    /// The response to this request; `comment` is cut to the 64 characters of an LO value.
    pub fn response(&self, status: Status, comment: Option<&str>) -> Self {
        let mut response = Self::default()
            .with_u16(element::COMMAND_FIELD, self.command_field().unwrap_or(0) | field::RESPONSE)
            .with_u16(element::RESPONDED_TO, self.message_id().unwrap_or(0))
            .with_u16(element::DATA_SET_TYPE, NO_DATA_SET)
            .with_u16(element::STATUS, status.0);
        for echoed in [element::AFFECTED_SOP_CLASS, element::AFFECTED_SOP_INSTANCE] {
            // Only what is a UID goes back: a response must not carry somebody's megabyte.
            if let Some(uid) = self.text(echoed).and_then(|text| Uid::parse(text).ok()) {
                response = response.with_text(echoed, uid.as_str(), 0);
            }
        }
        if let Some(comment) = comment {
            let plain: String =
                comment.chars().map(|c| if matches!(c, ' '..='~') && c != '\\' { c } else { '?' }).take(64).collect();
            response = response.with_text(element::ERROR_COMMENT, &plain, b' ');
        }
        response
    }

    /// Command Field (0000,0100).
    ///
    /// # Errors
    /// [`BadCommand::Missing`]
    pub fn command_field(&self) -> Result<u16, BadCommand> {
        self.u16(element::COMMAND_FIELD)
    }

    /// Message ID (0000,0110).
    ///
    /// # Errors
    /// [`BadCommand::Missing`]
    pub fn message_id(&self) -> Result<u16, BadCommand> {
        self.u16(element::MESSAGE_ID)
    }

    /// Message ID Being Responded To (0000,0120).
    ///
    /// # Errors
    /// [`BadCommand::Missing`]
    pub fn responded_to(&self) -> Result<u16, BadCommand> {
        self.u16(element::RESPONDED_TO)
    }

    /// Status (0000,0900) of a response.
    ///
    /// # Errors
    /// [`BadCommand::Missing`]
    pub fn status(&self) -> Result<Status, BadCommand> {
        self.u16(element::STATUS).map(Status)
    }

    /// Error Comment (0000,0902) of a response.
    pub fn error_comment(&self) -> Option<&str> {
        self.text(element::ERROR_COMMENT)
    }

    /// Whether a data set follows the command.
    ///
    /// # Errors
    /// [`BadCommand::Missing`]
    pub fn has_data_set(&self) -> Result<bool, BadCommand> {
        Ok(self.u16(element::DATA_SET_TYPE)? != NO_DATA_SET)
    }

    /// Affected SOP Class UID (0000,0002).
    ///
    /// # Errors
    /// [`BadCommand::Missing`]
    pub fn sop_class(&self) -> Result<Uid, BadCommand> {
        self.uid(element::AFFECTED_SOP_CLASS)
    }

    /// Affected SOP Instance UID (0000,1000).
    ///
    /// # Errors
    /// [`BadCommand::Missing`]
    pub fn sop_instance(&self) -> Result<Uid, BadCommand> {
        self.uid(element::AFFECTED_SOP_INSTANCE)
    }

    fn u16(&self, element: u16) -> Result<u16, BadCommand> {
        let bytes = self.elements.get(&element).and_then(|v| <[u8; 2]>::try_from(v.as_slice()).ok());
        bytes.map(u16::from_le_bytes).ok_or(BadCommand::Missing(element))
    }

    fn text(&self, element: u16) -> Option<&str> {
        let bytes = self.elements.get(&element)?;
        std::str::from_utf8(bytes).ok().map(|text| text.trim_end_matches(['\0', ' ']))
    }

    fn uid(&self, element: u16) -> Result<Uid, BadCommand> {
        self.text(element).and_then(|text| Uid::parse(text).ok()).ok_or(BadCommand::Missing(element))
    }

    fn with_u16(mut self, element: u16, value: u16) -> Self {
        self.elements.insert(element, value.to_le_bytes().to_vec());
        self
    }

    fn with_text(mut self, element: u16, text: &str, pad: u8) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        if bytes.len() % 2 == 1 {
            bytes.push(pad);
        }
        self.elements.insert(element, bytes);
        self
    }
}

fn put(bytes: &mut Vec<u8>, element: u16, value: &[u8]) {
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&element.to_le_bytes());
    bytes.extend_from_slice(&(value.len() as u32).to_le_bytes());
    bytes.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(text: &str) -> Uid {
        Uid::parse(text).unwrap()
    }

    #[test]
    fn a_command_set_comes_back_as_it_went() {
        let request = CommandSet::store_request(7, &uid("1.2.840.10008.5.1.4.1.1.2"), &uid("1.2.3"));
        let read = CommandSet::parse(&request.encode()).unwrap();
        assert_eq!(read.command_field(), Ok(field::STORE));
        assert_eq!(read.message_id(), Ok(7));
        assert_eq!(read.sop_instance(), Ok(uid("1.2.3")));
        assert_eq!(read.has_data_set(), Ok(true));
        let response = CommandSet::parse(&read.response(Status::OUT_OF_RESOURCES, Some("disk full")).encode()).unwrap();
        assert_eq!(response.command_field(), Ok(0x8001));
        assert_eq!(response.responded_to(), Ok(7));
        assert_eq!(response.status(), Ok(Status::OUT_OF_RESOURCES));
        assert_eq!(response.error_comment(), Some("disk full"));
        assert_eq!(response.has_data_set(), Ok(false));
    }

    #[test]
    fn a_lying_length_and_a_foreign_group_are_refused() {
        let mut bytes = CommandSet::echo_request(1, "1.2.840.10008.1.1").encode();
        bytes[12 + 4] = 0xff;
        assert_eq!(CommandSet::parse(&bytes), Err(BadCommand::Truncated(element::AFFECTED_SOP_CLASS)));
        assert_eq!(CommandSet::parse(&[8, 0, 5, 0, 0, 0, 0, 0]), Err(BadCommand::ForeignGroup(8)));
        assert_eq!(CommandSet::parse(&[0; 7]), Err(BadCommand::Ragged));
    }

    #[test]
    fn a_comment_is_cut_to_what_the_element_holds() {
        let request = CommandSet::echo_request(1, "1.2.840.10008.1.1");
        let response = request.response(Status::CANNOT_UNDERSTAND, Some(&"x\\\n".repeat(100)));
        assert_eq!(response.error_comment().map(str::len), Some(64));
        assert!(response.error_comment().unwrap().starts_with("x??x"));
    }
}
