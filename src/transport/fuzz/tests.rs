use super::*;
use crate::transport::Secret;

#[test]
fn any_text_as_a_ticket() {
    let ticket = Ticket {
        addresses: ["192.0.2.7:4433", "[2001:db8::1]:9"].map(|a| a.parse().unwrap()).to_vec(),
        certificate_sha256: [7; 32],
        secret: Secret([9; 32]),
        migration: MigrationId([1, 2, 3, 4, 5, 6, 7, 0xff]),
    };
    let text = ticket.to_string();
    let seeds = [text.clone(), format!(" {}\n", text.to_uppercase()), ticket.migration.to_string()];
    crate::fuzz_cases::run("tickets", fuzz_tickets, &seeds.map(String::into_bytes));
}

#[test]
fn any_bytes_as_the_first_words_of_a_connection() {
    let hello = |claim: u8| {
        let mut bytes = [claim; HELLO_BYTES];
        bytes[9..17].copy_from_slice(&(16u64 << 20).to_be_bytes());
        bytes.to_vec()
    };
    crate::fuzz_cases::run("handshakes", fuzz_handshakes, &[hello(1), hello(2)]);
}
