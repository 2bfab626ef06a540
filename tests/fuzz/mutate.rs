//! Mutations of an input, chosen by a seed.

/// Longest input, in bytes.
pub const LONGEST: usize = 4096;
/// Bytes with a meaning in one of the formats.
const ODD: &[u8] = b"\0\n\r\t \"'\\/.:;{}[],#-=$%&*!|>~09\x1b\x7f\x80\xc2\xe2\xff";

/// Applies one mutation.
pub fn mutate(chance: &mut Chance, input: &mut Vec<u8>, corpus: &[(String, Vec<u8>)], tokens: &[Vec<u8>]) {
    let other = chance.pick(corpus).map_or(&[][..], |(_, bytes)| bytes.as_slice());
    let token = chance.pick(tokens).map_or(&[][..], Vec::as_slice);
    let at = chance.below(input.len() + 1);
    // Short parts more often than long ones.
    let most = chance.below(input.len() - at + 1);
    let length = 1 + chance.below(most + 1);
    let end = (at + length).min(input.len());
    match chance.below(14) {
        0 => {
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1_u8 << chance.below(8);
            }
        }
        1 => {
            if let (Some(byte), Some(odd)) = (input.get_mut(at), chance.pick(ODD)) {
                *byte = *odd;
            }
        }
        2 => put(input, at, chance.pick(ODD).map_or(&[][..], std::slice::from_ref)),
        3 => put(input, at, token),
        4 => {
            let end = (at + token.len()).min(input.len());
            input.splice(at..end, token.iter().copied());
        }
        5 => drop(input.drain(at..end)),
        6 => input.truncate(at),
        7 => {
            let part = input[at..end].to_vec();
            let to = chance.below(input.len() + 1);
            put(input, to, &part);
        }
        8 => {
            input.truncate(at);
            input.extend_from_slice(&other[chance.below(other.len() + 1)..]);
        }
        9 => {
            let noise: Vec<u8> = (0..length.min(16)).map(|_| chance.byte()).collect();
            put(input, at, &noise);
        }
        10 => {
            let part = input[at..end].repeat(1 + chance.below(64));
            put(input, at, &part[..part.len().min(LONGEST)]);
        }
        // Most of the formats consist of lines.
        11 => {
            let at = line(chance, input);
            put(input, at, &[token, b"\n"].concat());
        }
        12 => {
            let (from, at) = (line(chance, other), line(chance, input));
            let rest = &other[from..];
            let end = rest.iter().position(|b| *b == b'\n').map_or(rest.len(), |n| n + 1);
            put(input, at, &rest[..end]);
        }
        _ => {
            let from = line(chance, input);
            let end = input[from..].iter().position(|b| *b == b'\n').map_or(input.len(), |n| from + n + 1);
            drop(input.drain(from..end));
        }
    }
}

fn put(input: &mut Vec<u8>, at: usize, part: &[u8]) {
    input.splice(at..at, part.iter().copied());
}

/// The start of a random line.
fn line(chance: &mut Chance, input: &[u8]) -> usize {
    let at = chance.below(input.len() + 1);
    input[..at].iter().rposition(|b| *b == b'\n').map_or(0, |n| n + 1)
}

/// Source of all randomness, from a seed. SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
pub struct Chance(pub u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[7]
    }

    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(n.max(1)).expect("64 bits")).expect("small")
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(self.below(from.len()))
    }
}
