// A program of a till: reads a few prices in a transaction, again and again, with statements that it keeps; each time all
// of them have to be of one catalogue. Prints how many reads there were and what was wrong, when its input ends.
import java.sql.*;
import java.util.Properties;

public class TillReader {
    public static void main(String[] arguments) throws Exception {
        int count = Integer.parseInt(arguments[1]), keys = 50;
        Properties readOnly = new Properties();
        readOnly.setProperty("open_mode", "1");
        Connection connection = DriverManager.getConnection("jdbc:sqlite:file:" + arguments[0] + "?mode=ro", readOnly);
        connection.setAutoCommit(false);
        PreparedStatement find = connection.prepareStatement("SELECT cents FROM prices WHERE key=?");
        long reads = 0, mixed = 0, missing = 0, errors = 0;
        String last = "";
        java.util.Random random = new java.util.Random(7);
        while (System.in.available() == 0) {
            try {
                int first = -1;
                boolean same = true;
                for (int number = 0; number < keys; number++) {
                    find.setString(1, String.format("k%07d", random.nextInt(count)));
                    try (ResultSet row = find.executeQuery()) {
                        if (!row.next()) {
                            missing++;
                        } else if (first < 0) {
                            first = row.getInt(1);
                        } else if (row.getInt(1) != first) {
                            same = false;
                        }
                    }
                }
                connection.commit();
                reads++;
                if (!same) mixed++;
            } catch (SQLException error) {
                errors++;
                last = error.getMessage();
                connection.rollback();
            }
        }
        System.out.println(reads + " " + mixed + " " + missing + " " + errors + " " + last);
    }
}
