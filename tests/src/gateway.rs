//! The Messages API as a run reaches it: through the gateway's socket, with the run's own token.

use std::io;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

/// Sends one request without streaming, and gives the status and the text of the answer or of its error.
///
/// # Errors
/// When there is no gateway, or it hangs up.
pub async fn ask(model: &str, prompt: &str) -> io::Result<(u16, String)> {
    let body = json!({
        "model": model, "max_tokens": 1000, "messages": [{ "role": "user", "content": prompt }],
        "tools": [{ "name": "Bash", "input_schema": {} }],
    });
    let (status, answer) = send("/v1/messages?beta=true", &body.to_string()).await?;
    let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
    let text = answer["content"][0]["text"]
        .as_str()
        .or(answer["error"]["message"].as_str());
    Ok((status, text.unwrap_or_default().to_owned()))
}

/// Posts this body, and gives the status and body of the answer.
///
/// # Errors
/// When there is no gateway, or it hangs up.
pub async fn send(path: &str, body: &str) -> io::Result<(u16, String)> {
    let socket = std::env::var_os("ANTHROPIC_UNIX_SOCKET").ok_or(io::ErrorKind::NotFound)?;
    let credential = if let Ok(key) = std::env::var("ANTHROPIC_API_KEY") {
        format!("x-api-key: {key}")
    } else {
        let token = ["CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_AUTH_TOKEN"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok());
        format!("authorization: Bearer {}", token.unwrap_or_default())
    };
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: gateway\r\n{credential}\r\nanthropic-version: 2023-06-01\r\n\
         content-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()))
}

/// Why there was no answer of the model.
#[derive(Debug)]
pub enum Failure {
    /// The gateway, or the API behind it, refused.
    Refused {
        /// The HTTP status.
        status: u16,
        /// The status and the API's sentence.
        text: String,
    },
    /// The connection failed or was cut.
    NoAnswer(String),
}

/// Asks for an answer that uses so many tokens, which the simulator gives, and reads it to its end.
///
/// # Errors
/// When there is no whole answer.
pub async fn pay(model: &str, input: u64, output: u64) -> Result<(), Failure> {
    let body = json!({
        "model": model, "max_tokens": output.max(1), "stream": true,
        "messages": [{ "role": "user", "content": format!("[[tokens:{input}:{output}]]") }],
    });
    let (status, answer) = send("/v1/messages?beta=true", &body.to_string())
        .await
        .map_err(|error| Failure::NoAnswer(error.to_string()))?;
    match status {
        // The end of chunks.
        200 if answer.ends_with("0\r\n\r\n") => Ok(()),
        200 => Err(Failure::NoAnswer("the answer was cut".to_owned())),
        status => {
            let body: Value = serde_json::from_str(&answer).unwrap_or_default();
            let message = body["error"]["message"].as_str().unwrap_or_default();
            Err(Failure::Refused {
                status,
                text: format!("{status} {message}"),
            })
        }
    }
}
