//! `scanside status`: how the service on this machine is.

use std::path::PathBuf;

use scanside::ingest::socket::Client;
use serde_json::Value;

use super::{Failure, print, print_json};

/// Asks a running service how it is: what it works on, which reports wait for whom, how much memory it uses.
///
///   scanside status --socket /run/scanside.sock
///   scanside status --socket /run/scanside.sock --forget old-viewer   # reports no longer wait for that receiver
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Arguments {
    /// The local socket of the service.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// First gives up a receiver that is gone for good: every report waits for each receiver the box knows.
    #[arg(long, value_name = "NAME")]
    forget: Option<String>,
    /// Prints the answer as one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments) -> Result<(), Failure> {
    let mut client = Client::connect(&arguments.socket, "scanside status").map_err(Failure::impossible)?;
    if let Some(receiver) = &arguments.forget {
        client.forget(receiver).map_err(Failure::impossible)?;
    }
    let status = client.status().map_err(Failure::impossible)?;
    if arguments.json {
        return print_json(&status);
    }
    let hello = client.hello();
    let mut text = format!("{} (scanside {})\n", hello.device, hello.version);
    lines(&status, "", &mut text);
    print(&text)
}

/// One line for each number or word, named by its path.
fn lines(value: &Value, path: &str, out: &mut String) {
    let mut go = |key: &str, value: &Value| {
        let path = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        lines(value, &path, out);
    };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| go(key, value)),
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => {
            items.iter().enumerate().for_each(|(n, value)| go(&n.to_string(), value));
        }
        Value::String(text) => *out += &format!("  {path:<28} {text}\n"),
        Value::Null => {}
        other => *out += &format!("  {path:<28} {other}\n"),
    }
}
