//! Association negotiation (PS3.8 7.1, 9.3): who may call, which SOP classes and transfer syntaxes are taken, and the
//! PDU that answers. Pure: bytes in, bytes out.

use std::fmt;

use dicom_ul::pdu::{
    AbortRQServiceProviderReason, AbortRQSource, AssociationAC, AssociationRJ, AssociationRJResult,
    AssociationRJServiceProviderASCEReason, AssociationRJServiceProviderPresentationReason,
    AssociationRJServiceUserReason, AssociationRJSource, AssociationRQ, MAXIMUM_PDU_SIZE, Pdu,
    PresentationContextProposed, PresentationContextResult, PresentationContextResultReason, UserVariableItem,
    read_pdu, write_pdu,
};

use super::transfer::decodable_transfer_syntaxes;
use crate::study::Uid;

/// Implicit VR Little Endian (PS3.5 A.1): what every application entity speaks.
const IMPLICIT_LITTLE: &str = "1.2.840.10008.1.2";

/// Verification SOP Class (PS3.4 A): C-ECHO.
pub const VERIFICATION: &str = "1.2.840.10008.1.1";

/// The DICOM Application Context Name (PS3.7 A.2.1): the only one there is.
const APPLICATION_CONTEXT: &str = "1.2.840.10008.3.1.1.1";

/// Who made the files and speaks on the wire: derived under 2.25 from the name of this program, the same for ever.
pub const IMPLEMENTATION_CLASS: &str = "2.25.94703664118365238329022835078886712491";

/// Implementation Version Name (0002,0013), at most 16 characters.
pub const IMPLEMENTATION_VERSION: &str = concat!("SCANSIDE_", env!("CARGO_PKG_VERSION"));

/// Bytes of an A-ASSOCIATE-RQ: 128 presentation contexts of a dozen transfer syntaxes each are 110 KiB.
pub const REQUEST_BYTES_MAX: usize = 256 * 1024;

/// The image SOP classes that are taken.
pub const STORAGE_CLASSES: [(&str, &str); 8] = [
    ("1.2.840.10008.5.1.4.1.1.2", "CT"),
    ("1.2.840.10008.5.1.4.1.1.2.1", "Enhanced CT"),
    ("1.2.840.10008.5.1.4.1.1.4", "MR"),
    ("1.2.840.10008.5.1.4.1.1.4.1", "Enhanced MR"),
    ("1.2.840.10008.5.1.4.1.1.6.1", "US"),
    ("1.2.840.10008.5.1.4.1.1.6", "US (retired)"),
    ("1.2.840.10008.5.1.4.1.1.3.1", "US multi-frame"),
    ("1.2.840.10008.5.1.4.1.1.3", "US multi-frame (retired)"),
];

/// An application entity title (PS3.5 6.2, AE): 1 to 16 printable characters without backslash.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AeTitle(Box<str>);

/// The text is no AE title.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an AE title (1 to 16 printable characters, no backslash): {0:?}")]
pub struct BadAeTitle(pub String);

impl AeTitle {
    /// Reads a title; spaces around it mean nothing.
    ///
    /// # Errors
    /// [`BadAeTitle`]
    pub fn parse(text: &str) -> Result<Self, BadAeTitle> {
        let title = text.trim_matches([' ', '\0']);
        let fits = (1..=16).contains(&title.len()) && title.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'\\');
        if fits { Ok(Self(title.into())) } else { Err(BadAeTitle(text.chars().take(40).collect())) }
    }

    /// The title without padding.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for AeTitle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an acceptor insists on.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The title we must be called by; none: any.
    pub called: Option<AeTitle>,
    /// The titles that may call; empty: any.
    pub callers: Vec<AeTitle>,
    /// Largest PDU we read, told to the peer (PS3.8 D.1).
    pub pdu_bytes_max: u32,
}

/// One agreed presentation context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// Odd, 1 to 255.
    pub id: u8,
    /// SOP class.
    pub sop_class: Uid,
    /// How its data sets are coded.
    pub transfer_syntax: Uid,
}

/// What was agreed.
#[derive(Debug, Clone)]
pub struct Agreed {
    /// The accepted contexts.
    pub contexts: Vec<Context>,
    /// Largest PDU the peer reads; 0: any.
    pub peer_pdu_bytes_max: u32,
    /// Who calls.
    pub calling: AeTitle,
    /// The A-ASSOCIATE-AC to send.
    pub answer: Vec<u8>,
}

/// A request that is turned down: the PDU to send, and a sentence for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// A-ASSOCIATE-RJ, or A-ABORT for bytes that are no request.
    pub answer: Vec<u8>,
    /// Why.
    pub why: String,
}

/// Reads an A-ASSOCIATE-RQ and answers it.
///
/// # Errors
/// [`Refusal`] when the association must not come about. Contexts that cannot be served do not refuse the whole:
/// each is answered by itself (PS3.8 9.3.3.2), before any image is sent.
pub fn negotiate(request: &[u8], policy: &Policy) -> Result<Agreed, Refusal> {
    let damaged = |why: String| Refusal { answer: abort_pdu(AbortReason::InvalidParameter), why };
    let request = match read_pdu(request, MAXIMUM_PDU_SIZE, false) {
        Ok(Some(Pdu::AssociationRQ(request))) => request,
        Ok(_) => return Err(damaged("the association request is incomplete".into())),
        Err(error) => return Err(damaged(format!("the association request is damaged: {error}"))),
    };
    if request.protocol_version & 1 == 0 {
        let source = AssociationRJServiceProviderASCEReason::ProtocolVersionNotSupported;
        return Err(reject(
            AssociationRJSource::ServiceProviderASCE(source),
            format!("protocol version {:#06x} is not DICOM's", request.protocol_version),
        ));
    }
    let user = AssociationRJSource::ServiceUser;
    if request.application_context_name.trim_end_matches(['\0', ' ']) != APPLICATION_CONTEXT {
        let reason = AssociationRJServiceUserReason::ApplicationContextNameNotSupported;
        return Err(reject(user(reason), "the application context is not DICOM's".into()));
    }
    let calling = AeTitle::parse(&request.calling_ae_title).ok();
    let calling = calling.filter(|title| policy.callers.is_empty() || policy.callers.contains(title)).ok_or_else(|| {
        let reason = AssociationRJServiceUserReason::CallingAETitleNotRecognized;
        reject(user(reason), format!("{:?} is not among the AE titles that may call", request.calling_ae_title))
    })?;
    let called = AeTitle::parse(&request.called_ae_title).ok();
    if called.is_none() || policy.called.as_ref().is_some_and(|ours| called.as_ref() != Some(ours)) {
        let reason = AssociationRJServiceUserReason::CalledAETitleNotRecognized;
        return Err(reject(user(reason), format!("called as {:?}, which is not us", request.called_ae_title)));
    }
    let mut contexts: Vec<Context> = Vec::new();
    let mut results = Vec::new();
    for proposed in &request.presentation_contexts {
        let seen = results.iter().any(|result: &PresentationContextResult| result.id == proposed.id);
        if proposed.id % 2 == 0 || seen {
            return Err(damaged(format!("presentation context {} is even or proposed twice", proposed.id)));
        }
        let (result, context) = answer_context(proposed);
        results.push(result);
        contexts.extend(context);
    }
    let peer_pdu_bytes_max = max_length(&request.user_variables);
    let answer = encode(&Pdu::AssociationAC(AssociationAC {
        protocol_version: 1,
        calling_ae_title: request.calling_ae_title,
        called_ae_title: request.called_ae_title,
        application_context_name: APPLICATION_CONTEXT.into(),
        presentation_contexts: results,
        user_variables: our_variables(policy.pdu_bytes_max),
    }))
    .ok_or_else(|| damaged("the AE titles cannot be sent back".into()))?;
    Ok(Agreed { contexts, peer_pdu_bytes_max, calling, answer })
}

/// Accepts the transfer syntax that is best for us among those proposed: uncompressed before lossless before lossy.
fn answer_context(proposed: &PresentationContextProposed) -> (PresentationContextResult, Option<Context>) {
    let plain = |text: &str| text.trim_end_matches(['\0', ' ']).to_owned();
    let sop_class = plain(&proposed.abstract_syntax);
    if sop_class != VERIFICATION && !STORAGE_CLASSES.iter().any(|(uid, _)| *uid == sop_class) {
        let reason = PresentationContextResultReason::AbstractSyntaxNotSupported;
        return (result(proposed.id, reason, IMPLICIT_LITTLE), None);
    }
    let offered: Vec<String> = proposed.transfer_syntaxes.iter().map(|s| plain(s)).collect();
    let syntax = decodable_transfer_syntaxes().iter().find(|ours| offered.iter().any(|theirs| theirs == ours.uid));
    let context = syntax.and_then(|syntax| {
        let (sop_class, transfer_syntax) = (Uid::parse(&sop_class).ok()?, Uid::parse(syntax.uid).ok()?);
        Some(Context { id: proposed.id, sop_class, transfer_syntax })
    });
    match context {
        Some(context) => {
            let reason = PresentationContextResultReason::Acceptance;
            (result(context.id, reason, context.transfer_syntax.as_str()), Some(context))
        }
        None => {
            let reason = PresentationContextResultReason::TransferSyntaxesNotSupported;
            (result(proposed.id, reason, IMPLICIT_LITTLE), None)
        }
    }
}

fn result(id: u8, reason: PresentationContextResultReason, syntax: &str) -> PresentationContextResult {
    PresentationContextResult { id, reason, transfer_syntax: syntax.into() }
}

fn max_length(variables: &[UserVariableItem]) -> u32 {
    variables.iter().find_map(|item| if let UserVariableItem::MaxLength(n) = item { Some(*n) } else { None }).unwrap_or(0)
}

fn our_variables(pdu_bytes_max: u32) -> Vec<UserVariableItem> {
    vec![
        UserVariableItem::MaxLength(pdu_bytes_max),
        UserVariableItem::ImplementationClassUID(IMPLEMENTATION_CLASS.into()),
        UserVariableItem::ImplementationVersionName(IMPLEMENTATION_VERSION.into()),
    ]
}

/// The A-ASSOCIATE-RQ of a requestor: one context per pair of SOP class and transfer syntax.
pub fn request_pdu(calling: &AeTitle, called: &AeTitle, contexts: &[Context], pdu_bytes_max: u32) -> Vec<u8> {
    let presentation_contexts = contexts
        .iter()
        .map(|context| PresentationContextProposed {
            id: context.id,
            abstract_syntax: context.sop_class.to_string(),
            transfer_syntaxes: vec![context.transfer_syntax.to_string()],
        })
        .collect();
    encode(&Pdu::AssociationRQ(AssociationRQ {
        protocol_version: 1,
        calling_ae_title: calling.to_string(),
        called_ae_title: called.to_string(),
        application_context_name: APPLICATION_CONTEXT.into(),
        presentation_contexts,
        user_variables: our_variables(pdu_bytes_max),
    }))
    .expect("AE titles and UIDs always encode")
}

/// What a requestor was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A-ASSOCIATE-AC: the ids of the accepted contexts, and the largest PDU the peer reads (0: any).
    Accepted {
        /// Ids out of the request.
        contexts: Vec<u8>,
        /// PS3.8 D.1.
        peer_pdu_bytes_max: u32,
    },
    /// A-ASSOCIATE-RJ.
    Rejected {
        /// Trying again later may help.
        transient: bool,
        /// In words.
        why: String,
    },
    /// A-ABORT.
    Aborted,
    /// Something else.
    Unexpected,
}

/// Reads the answer to an association request.
pub fn read_reply(pdu: &[u8]) -> Reply {
    match read_pdu(pdu, MAXIMUM_PDU_SIZE, false) {
        Ok(Some(Pdu::AssociationAC(accepted))) => Reply::Accepted {
            contexts: accepted
                .presentation_contexts
                .iter()
                .filter(|result| result.reason == PresentationContextResultReason::Acceptance)
                .map(|result| result.id)
                .collect(),
            peer_pdu_bytes_max: max_length(&accepted.user_variables),
        },
        Ok(Some(Pdu::AssociationRJ(rejection))) => Reply::Rejected {
            transient: rejection.result == AssociationRJResult::Transient,
            why: rejection.source.to_string(),
        },
        Ok(Some(Pdu::AbortRQ { .. })) => Reply::Aborted,
        _ => Reply::Unexpected,
    }
}

/// Why we abort (PS3.8 9.3.8, source 2, service provider).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbortReason {
    /// Time is up, or we are going down.
    Unspecified,
    /// A PDU type nobody knows.
    UnrecognizedPdu,
    /// A PDU that has no place here.
    UnexpectedPdu,
    /// A field or a length that cannot be.
    InvalidParameter,
}

/// An A-ABORT PDU.
pub fn abort_pdu(reason: AbortReason) -> Vec<u8> {
    let reason = match reason {
        AbortReason::Unspecified => AbortRQServiceProviderReason::ReasonNotSpecified,
        AbortReason::UnrecognizedPdu => AbortRQServiceProviderReason::UnrecognizedPdu,
        AbortReason::UnexpectedPdu => AbortRQServiceProviderReason::UnexpectedPdu,
        AbortReason::InvalidParameter => AbortRQServiceProviderReason::InvalidPduParameter,
    };
    encode(&Pdu::AbortRQ { source: AbortRQSource::ServiceProvider(reason) }).expect("an abort always encodes")
}

/// A-RELEASE-RQ.
pub fn release_request_pdu() -> Vec<u8> {
    encode(&Pdu::ReleaseRQ).expect("a release always encodes")
}

/// A-RELEASE-RP.
pub fn release_reply_pdu() -> Vec<u8> {
    encode(&Pdu::ReleaseRP).expect("a release always encodes")
}

/// The A-ASSOCIATE-RJ for one association too many: transient, local limit exceeded (PS3.8 9.3.4).
pub fn busy_pdu() -> Vec<u8> {
    let reason = AssociationRJServiceProviderPresentationReason::LocalLimitExceeded;
    encode(&Pdu::AssociationRJ(AssociationRJ {
        result: AssociationRJResult::Transient,
        source: AssociationRJSource::ServiceProviderPresentation(reason),
    }))
    .expect("a rejection always encodes")
}

fn reject(source: AssociationRJSource, why: String) -> Refusal {
    let pdu = Pdu::AssociationRJ(AssociationRJ { result: AssociationRJResult::Permanent, source });
    Refusal { answer: encode(&pdu).expect("a rejection always encodes"), why }
}

fn encode(pdu: &Pdu) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    write_pdu(&mut bytes, pdu).ok().map(|()| bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CT: &str = STORAGE_CLASSES[0].0;

    fn policy() -> Policy {
        Policy { called: None, callers: vec![], pdu_bytes_max: 16_384 }
    }

    fn context(id: u8, sop_class: &str, syntax: &str) -> Context {
        Context { id, sop_class: Uid::parse(sop_class).unwrap(), transfer_syntax: Uid::parse(syntax).unwrap() }
    }

    fn title(text: &str) -> AeTitle {
        AeTitle::parse(text).unwrap()
    }

    fn request(contexts: &[Context]) -> Vec<u8> {
        request_pdu(&title("CT1"), &title("BOX"), contexts, 16_384)
    }

    #[test]
    fn each_context_is_answered_by_itself() {
        let proposed = [
            context(1, VERIFICATION, IMPLICIT_LITTLE),
            context(3, CT, IMPLICIT_LITTLE),
            context(5, CT, "1.2.840.10008.1.2.4.201"),
            context(7, "1.2.840.10008.5.1.4.1.1.104.1", IMPLICIT_LITTLE),
        ];
        let agreed = negotiate(&request(&proposed), &policy()).unwrap();
        assert_eq!(agreed.contexts, proposed[..2]);
        assert_eq!(agreed.calling, title("CT1"));
        let reply = read_reply(&agreed.answer);
        assert_eq!(reply, Reply::Accepted { contexts: vec![1, 3], peer_pdu_bytes_max: 16_384 });
        let Ok(Some(Pdu::AssociationAC(answer))) = read_pdu(&agreed.answer[..], MAXIMUM_PDU_SIZE, false) else { panic!() };
        let reasons: Vec<_> = answer.presentation_contexts.iter().map(|r| r.reason.clone() as u8).collect();
        assert_eq!(reasons, [0, 0, 4, 3], "transfer syntaxes not supported, abstract syntax not supported");
    }

    #[test]
    fn strangers_are_rejected_with_the_reason_of_the_standard() {
        let bytes = request(&[context(1, VERIFICATION, IMPLICIT_LITTLE)]);
        let check = |policy: Policy, source: u8, reason: u8| {
            let refusal = negotiate(&bytes, &policy).unwrap_err();
            assert_eq!(refusal.answer, [3, 0, 0, 0, 0, 4, 0, 1, source, reason], "{}", refusal.why);
        };
        check(Policy { callers: vec![title("MR1")], ..policy() }, 1, 3);
        check(Policy { called: Some(title("OTHER")), ..policy() }, 1, 7);
        let allowed = Policy { callers: vec![title("MR1"), title("CT1")], called: Some(title("BOX")), ..policy() };
        assert!(negotiate(&bytes, &allowed).is_ok());
    }

    #[test]
    fn a_foreign_protocol_version_or_application_context_is_rejected() {
        let bytes = request(&[context(1, VERIFICATION, IMPLICIT_LITTLE)]);
        let mut version = bytes.clone();
        version[7] = 2;
        assert_eq!(negotiate(&version, &policy()).unwrap_err().answer[7..], [1, 2, 2]);
        let mut application = bytes;
        application[74 + 4] = b'9';
        assert_eq!(negotiate(&application, &policy()).unwrap_err().answer[7..], [1, 1, 2]);
    }

    #[test]
    fn a_damaged_request_is_aborted() {
        let bytes = request(&[context(1, CT, IMPLICIT_LITTLE), context(1, CT, IMPLICIT_LITTLE)]);
        assert_eq!(negotiate(&bytes, &policy()).unwrap_err().answer, abort_pdu(AbortReason::InvalidParameter));
        assert_eq!(negotiate(&bytes[..80], &policy()).unwrap_err().answer, abort_pdu(AbortReason::InvalidParameter));
    }

    #[test]
    fn the_busy_answer_is_transient() {
        assert_eq!(busy_pdu(), [3, 0, 0, 0, 0, 4, 0, 2, 3, 2]);
    }

    #[test]
    fn the_implementation_class_is_derived_from_our_name() {
        assert_eq!(Uid::derived(b"scanside implementation class").as_str(), IMPLEMENTATION_CLASS);
    }
}
