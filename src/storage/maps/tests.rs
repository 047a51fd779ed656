use super::*;

#[test]
fn words_name_every_page_of_a_range_once() {
    for (from, to) in [
        (0, 1),
        (0, 4096),
        (512, 4608),
        (4096 * 63, 4096 * 65),
        (0, CHUNK_BYTES),
        (CHUNK_BYTES - 1, CHUNK_BYTES),
    ] {
        let mut seen = [0_u64; WORDS];
        each_word(from, to, |word, mask| {
            assert_eq!(seen[word] & mask, 0);
            seen[word] |= mask;
        });
        for page in 0..PAGES {
            let start = page as u64 * PAGE_BYTES;
            let touched = from < start + PAGE_BYTES && to > start;
            assert_eq!(seen[page / 64] >> (page % 64) & 1 == 1, touched, "{from}..{to}: page {page}");
        }
    }
}
