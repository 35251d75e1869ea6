//! Requests that can't be read as HTTP. The HTTP library answers them itself, before any service is asked, with a status
//! and no body; here the answer gets what all others have: a problem and the usual headers.

use http::{HeaderMap, HeaderName, HeaderValue};
use std::fmt::Write as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::http::problem::Problem;
use crate::http::request::headers::request_id;
use crate::http::serve::{DEFAULTS, MAX_URI};

/// A connection on which the library's own answers are completed.
#[derive(Debug)]
pub struct Explaining<S> {
    stream: S,
    problem_type_base: String,
    /// What is written in place of the library's answer, and how much of it has been written.
    answer: Option<(Vec<u8>, usize)>,
}

impl<S> Explaining<S> {
    /// Wraps a connection. `problem_type_base` stands before the code in a problem's `type`.
    pub fn new(stream: S, problem_type_base: String) -> Self {
        Self {
            stream,
            problem_type_base,
            answer: None,
        }
    }
}

/// The library's answer, if this is one: the whole head of an error without a body and without the id that every answer
/// of the service has.
fn own_answer(written: &[u8]) -> Option<(&str, Problem)> {
    let rest = written.strip_prefix(b"HTTP/1.1 4")?;
    let problem = match rest.get(..3)? {
        b"00 " => Problem::BadRequest("The request can't be read as HTTP/1.1".into()),
        b"14 " => Problem::UriTooLong(MAX_URI),
        b"31 " => Problem::HeadersTooLarge,
        _ => return None,
    };
    let head = std::str::from_utf8(written).ok()?.strip_suffix("\r\n\r\n")?;
    let bare = head.contains("\r\ncontent-length: 0")
        && !head.contains("x-request-id")
        && !head.contains("\r\n\r\n");
    bare.then_some((head, problem))
}

/// The same answer with a problem.
fn explained(head: &str, problem: &Problem, type_base: &str) -> Vec<u8> {
    let request_id = request_id(&HeaderMap::new());
    tracing::debug!(request.id = %request_id, http.status = problem.status().as_u16(), "refused what can't be read");
    let body = problem.body(type_base, "/", &request_id);
    let mut text = String::new();
    for line in head
        .split("\r\n")
        .filter(|line| !line.starts_with("content-length:"))
    {
        let _ = write!(text, "{line}\r\n");
    }
    let mut header = |name: &HeaderName, value: &HeaderValue| {
        let _ = write!(text, "{name}: {}\r\n", value.to_str().unwrap_or_default());
    };
    problem.set_headers(|name, value| header(&name, &value));
    for (name, value) in DEFAULTS {
        header(&name, &HeaderValue::from_static(value));
    }
    let _ = write!(
        text,
        "x-request-id: {request_id}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let mut answer = text.into_bytes();
    answer.extend(body);
    answer
}

impl<S: AsyncRead + Unpin> AsyncRead for Explaining<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Explaining<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.answer.is_none() {
            this.answer = own_answer(buf)
                .map(|(head, problem)| (explained(head, &problem, &this.problem_type_base), 0));
        }
        let Some((answer, written)) = &mut this.answer else {
            return Pin::new(&mut this.stream).poll_write(cx, buf);
        };
        while *written < answer.len() {
            match ready!(Pin::new(&mut this.stream).poll_write(cx, &answer[*written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => *written += count,
            }
        }
        this.answer = None;
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match bufs {
            [first, ..] if self.answer.is_some() || own_answer(first).is_some() => self.poll_write(cx, first),
            _ => Pin::new(&mut self.stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const BARE: &[u8] =
        b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n";

    /// What arrives of what is written, through a connection that takes a few bytes at a time.
    async fn arrives(written: &[u8]) -> String {
        let (near, mut far) = tokio::io::duplex(7);
        let mut near = Explaining::new(near, "urn:problem:".to_owned());
        let (written, read) = tokio::join!(
            async {
                near.write_all(written).await?;
                near.shutdown().await
            },
            async {
                let mut text = String::new();
                far.read_to_string(&mut text).await.map(|_| text)
            }
        );
        written.unwrap();
        read.unwrap()
    }

    #[tokio::test]
    async fn an_answer_of_the_library_gets_a_problem() {
        let text = arrives(BARE).await;

        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 400 Bad Request\r\nconnection: close\r\ndate:"),
            "{head}"
        );
        assert!(
            head.contains("\r\ncontent-type: application/problem+json\r\n"),
            "{head}"
        );
        assert!(head.contains("\r\nx-content-type-options: nosniff\r\n"), "{head}");
        assert!(
            head.ends_with(&format!("content-length: {}", body.len())),
            "{head}"
        );
        assert_eq!(head.matches("content-length").count(), 1, "{head}");
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(
            (&body["status"], &body["code"]),
            (&400.into(), &"bad-request".into())
        );
    }

    #[tokio::test]
    async fn whatever_else_is_written_stays_as_it_is() {
        for other in [
            "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 400 Bad Request\r\nx-request-id: a\r\ncontent-length: 0\r\n\r\n",
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}",
            "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\nmore\r\n\r\n",
            "HTTP/1.1 4",
        ] {
            assert_eq!(arrives(other.as_bytes()).await, other);
        }
    }
}
