use std::io;
use std::sync::{Arc, Mutex};

use tracing::level_filters::LevelFilter;

use super::*;

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The ways in which bytes are usually written.
fn spellings(secret: &[u8; 32]) -> [String; 3] {
    let hex = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    [hex, format!("{secret:?}"), String::from_utf8_lossy(secret).into_owned()]
}

#[tokio::test]
async fn neither_tickets_nor_keys_are_logged_however_much_is() {
    let log = Log::default();
    let (written, options) = (log.clone(), options());
    // Everything here is on this one thread.
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(move || written.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let (listener, ticket) = listen(&options);
    let wrong = Ticket { secret: Secret::random(), ..ticket.clone() };
    assert!(connect(&wrong, &options).await.is_err());
    let (sender, receiver) = meet(&listener, &ticket, &options).await;
    let key = sender.session_key();
    tracing::info!("{ticket:?} {key:?} {sender:?} {receiver:?} {listener:?}");
    sender.abandon();
    let (again, _back) =
        tokio::join!(reconnect(&ticket, &key, &options), listener.accept_resumed(&key, None));
    again.unwrap().close(0, "done").await;
    let text = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    assert!(text.contains("TRACE") && text.contains("Secret(..)"), "it says much: {text}");
    let word = ticket.to_string();
    let mut secrets = vec![word.clone(), word[word.len() / 2..].to_owned()];
    secrets.extend(spellings(&ticket.secret.0));
    secrets.extend(spellings(&key.0.0));
    secrets.extend(spellings(&wrong.secret.0));
    for secret in secrets {
        assert!(!text.contains(&secret), "a secret is logged: {secret}");
    }
}
