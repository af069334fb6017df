"""`tltrain distil`: a student's recipe from finished runs, its cost, and the comparison of student and teacher."""
